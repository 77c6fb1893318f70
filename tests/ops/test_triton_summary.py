"""The summary of a segment by the kernels: the chunked path's law, values and gradients, and its place between ranks."""

import pytest
import torch

from mamba3.ops import State, apply, merge, scan, summarize
from mamba3.ops.segments import Summary
from tests.ops.cases import Sizes, distance, inputs, random_state
from tests.ops.test_segments import SUMMARY_ARGUMENTS
from tests.ops.test_triton import DEVICE, DTYPES, FLOOR, arguments, place

pytest.importorskip("triton")
from mamba3.ops.triton import forward
from mamba3.ops.triton.launch import Launch, device_limits
from mamba3.ops.triton.tables import closed_tables

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPES = {
    "siso": Sizes(b=1, t=65, per_group=2, p=24, n=20, a=5),
    "two groups, all rotated": Sizes(b=1, t=33, g=2, per_group=1, p=16, n=16, a=8),
    "mimo": Sizes(b=1, t=23, per_group=2, p=24, n=20, a=5, r=3),
    "mimo, no rotation": Sizes(b=1, t=17, per_group=2, p=8, n=12, a=0, r=2),
    "one token": Sizes(b=2, t=1, per_group=2, p=8, n=8, a=2),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels that were defined for the interpreter (tests/conftest.py) run under the same setting."""
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def drawn(s, dtype):
    values = place(inputs(s, dtype=dtype, tick=s.r == 1))
    return {name: v for name, v in values.items() if name in SUMMARY_ARGUMENTS}


def values_and_gradients(values, impl, wide=False):
    """Fields of the summary, angles on the circle, and gradients of a random linear function of all of them."""
    leaves = {name: (v.double() if wide else v.clone()).requires_grad_() for name, v in values.items()}
    found = summarize(**leaves, impl=impl)
    draw, loss = torch.Generator().manual_seed(1), 0
    for v in found:
        weight = torch.randn(v.shape, generator=draw).to(v.device)
        loss = loss + (v.double() * weight.double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    fields = found._replace(phi=torch.view_as_real(torch.polar(torch.ones_like(found.phi), found.phi)))
    return fields._asdict(), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_summary_is_that_of_the_reference(shape, dtype):
    values = drawn(SHAPES[shape], dtype)
    ours, yardstick = (values_and_gradients(values, impl) for impl in ("triton", "chunked"))
    truth = values_and_gradients(values, "reference", wide=True)
    for mine, theirs, true in zip(ours, yardstick, truth, strict=True):
        assert [v.dtype for v in mine.values()] == [v.dtype for v in theirs.values()]
        for name in true:
            # The chunked path sums angles in float64: theirs is the law that the scan's angles are held to.
            allowed = 2e-5 if name == "phi" else 2 * distance(theirs[name], true[name]) + FLOOR
            assert distance(mine[name], true[name]) <= allowed, name


def test_parts_of_any_number_of_segments_merge_to_the_scan():
    s = Sizes(b=1, t=40, per_group=1, p=16, n=16, a=4, r=2)
    values, start = place(inputs(s, dtype=torch.float32)), random_state(s, dtype=torch.float32).to(DEVICE)
    own = {name: v for name, v in values.items() if name in SUMMARY_ARGUMENTS}
    parts = [
        summarize(**{k: v if k.endswith(("hrn", "hrp")) else v[:, a:b] for k, v in own.items()}, impl="triton")
        for a, b in ((0, 19), (19, 40))
    ]
    mimo = values["mimo_x_hrp"]
    after = apply(start, merge(*parts, mimo), mimo)
    expected = scan(**values, state=start, impl="reference").state
    for mine, true in zip(after[1:4], expected[1:4], strict=True):
        assert distance(mine, true) < 2e-6


@pytest.mark.parametrize("programs", [1, 64])
def test_the_last_state_is_the_scan_s_however_it_is_cut(programs):
    s = Sizes(b=2, t=40, per_group=1, p=16, n=16, a=4)
    values, state = place(inputs(s, dtype=torch.float32)), random_state(s, dtype=torch.float32).to(DEVICE)
    inp, gate, *_ = arguments(values)
    limits = device_limits(torch.device(DEVICE))._replace(multiprocessors=programs)
    for given in (None, state):
        ours = forward.final_state(inp, given, launch=Launch(16, 4, 1), limits=limits)
        expected = forward.scan(inp, gate, given, None, launch=Launch(16, 4, 1), limits=limits).state
        assert all(distance(mine, true) < 1e-6 for mine, true in zip(ours[:4], expected[:4], strict=True))


def test_an_empty_segment_closes_each_sequence():
    made = closed_tables((0, 40, 41, 100), 16, 4, torch.device("cpu"))
    segments = made.segments.tolist()
    for i, ((first, count), end) in enumerate(zip(made.sequence_segments.tolist(), (40, 41, 100), strict=True)):
        *whole, last = segments[first : first + count]
        assert last[:2] == [end, end] and last[3:] == [i, i]
        assert whole[-1][1] == end and all(each[3] == i and each[4] == -1 for each in whole)


def test_gradients_of_one_field_alone_and_of_none():
    s = Sizes(b=1, t=9, per_group=1, p=8, n=8, a=2)
    values = {name: v.requires_grad_() for name, v in drawn(s, torch.float32).items()}
    leaves = list(values.values())

    def grads(field, impl):
        v = getattr(summarize(**values, impl=impl), field)
        weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(v.device)
        return torch.autograd.grad((v * weight).sum(), leaves, allow_unused=True)

    for field in Summary._fields:
        for name, mine, theirs in zip(values, grads(field, "triton"), grads(field, "chunked"), strict=True):
            size = torch.zeros(()) if theirs is None else theirs
            assert distance(torch.zeros_like(size) if mine is None else mine, size) < 1e-5, (field, name)


def test_asking_for_what_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values = drawn(Sizes(t=3, a=2), torch.float32)
    if not ON_GPU:
        with pytest.raises(ValueError, match="need a CUDA or ROCm device, not cpu"):
            summarize(**values, impl="triton")
    with pytest.raises(ValueError, match="impl must be auto"):
        summarize(**values, impl="fused")  # pyright: ignore[reportArgumentType]


def test_between_parts_gradients_are_those_of_the_whole():
    """What context parallelism does, in one process: the second part from the first one's summary."""
    s = Sizes(b=1, t=40, per_group=1, p=8, n=8, a=2)
    values = {name: v.requires_grad_() for name, v in place(inputs(s, dtype=torch.float32)).items()}
    leaves, cut = list(values.values()), 21
    whole = scan(**values, impl="triton").y
    weight = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = torch.autograd.grad((whole * weight).sum(), leaves)
    moving = {k for k, v in values.items() if v.ndim > 2 and v.shape[1] == s.t}
    part = [{k: v[:, a:b] if k in moving else v for k, v in values.items()} for a, b in ((0, cut), (cut, s.t))]
    summary = summarize(**{k: v for k, v in part[0].items() if k in SUMMARY_ARGUMENTS}, impl="triton")
    entering = State(summary.phi, summary.S, summary.B_last, summary.x_last)
    ys = [scan(**part[0], impl="triton").y, scan(**part[1], state=entering, impl="triton").y]
    ours = torch.autograd.grad((torch.cat(ys, 1) * weight).sum(), leaves)
    assert all(distance(mine, true) < 1e-5 for mine, true in zip(ours, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("t", [63, 4096])
def test_on_the_device_at_the_model_s_sizes(t, rank):
    values = drawn(Sizes(b=1, t=t, per_group=64, p=64, n=128, a=32, r=rank), torch.bfloat16)
    ours, yardstick = (values_and_gradients(values, impl) for impl in ("auto", "chunked"))
    truth = values_and_gradients({name: v.double() for name, v in values.items()}, "chunked", wide=True)
    for mine, theirs, true in zip(ours, yardstick, truth, strict=True):
        for name in true:
            allowed = 2e-5 if name == "phi" else 2 * distance(theirs[name], true[name]) + FLOOR
            assert distance(mine[name], true[name]) <= allowed, name
