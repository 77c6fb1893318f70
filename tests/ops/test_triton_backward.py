"""Gradients of the kernels: on a CPU in Triton's interpreter, on small shapes; with -m gpu on the device, in every dtype.

The yardstick is the error of the chunked path's own gradients in the same dtype: the kernels' may be twice that, each
gradient for itself. Errors are roots of the mean square over random draws, several where a gradient has few elements: the
error of twenty numbers in one draw is luck (one of 16 draws in float16 has a ratio of 4.8, half have less than 0.83).
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mamba3 import ops
from mamba3.nn import mixer
from mamba3.nn.mixer import Mamba3
from mamba3.ops import State, chunked, reference
from mamba3.ops.scan import run_scan
from tests.ops.cases import Sizes, distance, inputs, random_state
from tests.ops.test_triton import DEVICE, DTYPES, FLOOR, SHAPES, arguments, place

pytest.importorskip("triton")
from mamba3.ops.triton import backward, library
from mamba3.ops.triton.launch import Scratch
from mamba3.ops.triton.windows import plan

ON_GPU = torch.cuda.is_available()
# The interpreter computes in masked lanes too, where 0 * inf is nobody's business.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TRITON = library.scan


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels that were defined for the interpreter (tests/conftest.py) run under the same setting."""
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def gradients(scan, values, state=None, cu_seqlens=None, *, exact=False, ends=True, **options):
    """Of a random linear function of y and, with `ends`, of the last state: by argument, the state's fields included."""

    def leaf(v):
        return (v.double() if exact else v.clone()).requires_grad_()

    leaves = {name: leaf(v) for name, v in values.items()}
    given = None if state is None else State(*(leaf(v) for v in state[:4]))
    inp, gate, checked, boundaries = arguments(leaves, given, cu_seqlens, **options)
    out = scan(inp, gate, None if given is None and scan is TRITON else checked, boundaries)
    draw = torch.Generator().manual_seed(1)
    loss = 0
    for i, v in enumerate((out.y, *out.state[:4])):
        weight = torch.randn(v.shape, generator=draw).to(values["x_bthp"].dtype if i != 1 and i != 2 else torch.float32)
        loss = loss + (v.double() * weight.to(v.device).double()).sum() * (1 if i == 0 or ends else 0)
    if given is not None:
        leaves |= dict(zip(given._fields, given[:4], strict=False))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(v) if grad is None else grad
        for (name, v), grad in zip(leaves.items(), grads, strict=True)
    }


def errors(found, truths):
    """Relative errors by argument, over several draws."""
    return {
        name: (sum(distance(ours[name], truth[name]) ** 2 for ours, truth in pairs) / len(pairs)) ** 0.5
        for pairs in [list(zip(found, truths, strict=True))]
        for name in truths[0]
    }


def assert_within_twice_the_chunked_error(values, state=None, cu_seqlens=None, more=(), **options):
    """`more`: further draws of values and state."""
    draws = [(values, state), *more]
    truth = [gradients(reference.scan, *draw, cu_seqlens, exact=True, **options) for draw in draws]
    yardstick = [gradients(chunked.scan, *draw, cu_seqlens, **options) for draw in draws]
    ours = [gradients(TRITON, *draw, cu_seqlens, **options) for draw in draws]
    assert [v.dtype for v in ours[0].values()] == [v.dtype for v in yardstick[0].values()]
    allowed = {name: 2 * error + FLOOR for name, error in errors(yardstick, truth).items()}
    assert not {name: (e, allowed[name]) for name, e in errors(ours, truth).items() if not e <= allowed[name]}
    return ours[0]


DRAWS = {"mimo, no rotation": 8}  # of shapes whose smallest gradients have few elements


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_reference(shape, dtype):
    s = SHAPES[shape] if shape != "one token" else Sizes(b=8, t=1, per_group=4, p=8, n=8, a=2)
    (values, state), *more = (
        (
            place(inputs(s, dtype=dtype, tick=shape == "siso")),
            random_state(s, dtype=dtype).to(DEVICE) if shape != "siso" else None,
        )
        for _ in range(DRAWS.get(shape, 1))
    )
    assert_within_twice_the_chunked_error(values, state, more=more)


def test_y_alone_and_without_gate():
    s = Sizes(b=1, t=34, per_group=2, p=16, n=16, a=4, r=2)
    values = place(inputs(s, dtype=torch.float32))
    assert_within_twice_the_chunked_error(values, ends=False)
    assert_within_twice_the_chunked_error(place(inputs(s, dtype=torch.float32, gate=False)))


@pytest.mark.parametrize("out_norm", ["pre_gate_grouped", "post_gate"])
def test_with_out_norm(out_norm):
    s = Sizes(b=1, t=20, per_group=2, p=16, n=16, a=4)
    values = place(inputs(s, dtype=torch.float16))
    weight = 1 + torch.rand(s.h, s.p, device=DEVICE)
    assert_within_twice_the_chunked_error(values, out_norm=out_norm, norm_weight=weight)


def test_a_pack_with_states_cut_into_segments_and_windows(monkeypatch):
    s = Sizes(b=1, t=150, per_group=2, p=16, n=16, a=4)
    values = place(inputs(s, dtype=torch.float32))
    state, boundaries = random_state(s, batch=5, dtype=torch.float32).to(DEVICE), [0, 1, 2, 70, 149, 150]
    whole = assert_within_twice_the_chunked_error(values, state, boundaries)
    size = (
        s.h * s.p * s.n * 4
    )  # a chunk's states; twice that are its rows, and 4 of them for long sequences are 1 chunk
    monkeypatch.setattr(backward, "prepare", with_scratch(backward.prepare, Scratch(0, 3 * size, 4 * size)))
    cut = gradients(TRITON, values, state, boundaries)
    assert all(distance(cut[name], whole[name]) < 1e-5 for name in whole)


def with_scratch(prepare, scratch):
    return lambda *arguments: prepare(*arguments[:-1], scratch)


@pytest.mark.parametrize("piece", [3, 100])
def test_windows_and_their_pieces_cover_the_tokens_and_hold_no_more_than_they_may(piece):
    boundaries = (0, 1, 2, 70, 149, 150, 900)
    made = plan(boundaries, 16, 4, 8, piece, torch.device("cpu"))
    pieces = [p for w in made.windows for p in w.pieces]
    for ranges in ([p.tokens for p in pieces], [p.chunks for p in pieces], [w.chunks for w in made.windows]):
        assert [begin for begin, _ in ranges] == [0] + [end for _, end in ranges[:-1]]
    assert pieces[-1].tokens[1] == 900
    assert pieces[-1].chunks[1] == made.windows[-1].chunks[1] == made.chunks.shape[0]
    assert all(0 < w.chunks[1] - w.chunks[0] <= 8 for w in made.windows)
    assert all(0 < p.chunks[1] - p.chunks[0] <= piece for p in pieces)
    assert all(made.chunks[p.chunks[0], 0] == p.tokens[0] for p in pieces)
    assert all(boundaries[s] == begin and boundaries[s + 1] == end for _, end, begin, s, _ in made.chunks.tolist())


@pytest.mark.parametrize("exponent", [-1e-6, -1.0, -50.0, None])
def test_extreme_decays(exponent):
    """A dt of each token; None mixes -50 with -1e-6. lam is 0 or 1 for some tokens, so that weights vanish."""
    s = Sizes(b=1, t=40, per_group=2, p=16, n=16, a=4)
    values = place(inputs(s, dtype=torch.float32))
    wanted = torch.full_like(values["dt_bth"], exponent or -50.0)
    if exponent is None:
        wanted[torch.rand_like(wanted) < 0.7] = -1e-6
    values["A_bth"] = wanted / values["dt_bth"]
    values["lam_bth"] = (3 * values["lam_bth"] - 1).clamp(0, 1)
    assert_within_twice_the_chunked_error(values, random_state(s, dtype=torch.float32).to(DEVICE))


SMALL = Sizes(b=1, t=9, per_group=1, p=8, n=8, a=2)


def test_runs_are_bitwise_equal_and_columns_of_a_projection_have_the_same_gradient():
    values = place(inputs(SMALL, dtype=torch.float32))
    joined = torch.cat([values["z_bthp"].flatten(2), values["x_bthp"].flatten(2)], -1).requires_grad_()
    z, x = (v.unflatten(-1, (SMALL.h, SMALL.p)) for v in joined.chunk(2, dim=-1))
    apart = gradients(TRITON, values, ends=False)
    again = gradients(TRITON, values, ends=False)
    assert all(torch.equal(again[name], apart[name]) for name in apart)
    y = ops.scan(**values | {"z_bthp": z, "x_bthp": x}, impl="triton").y
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    (grad,) = torch.autograd.grad((y * weight).sum(), joined)
    assert torch.equal(grad, torch.cat([apart["z_bthp"].flatten(2), apart["x_bthp"].flatten(2)], -1))


def test_the_op_is_one_that_torch_trusts():
    """Schema, fake results, autograd registration, and tracing of forward and backward."""
    values = place(inputs(SMALL, dtype=torch.float32))
    state = random_state(SMALL, dtype=torch.float32).to(DEVICE)
    inp, gate, state, _ = arguments({name: v.requires_grad_() for name, v in values.items()}, state)
    torch.library.opcheck(library.scan_op, (*inp, *gate[:3], *state[:4], None, False))


def test_subclasses_of_tensors_see_one_op():
    """They know an op's schema, and what it does without data; not what is inside it."""

    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    values = {name: v.requires_grad_() for name, v in place(inputs(SMALL, dtype=torch.float32)).items()}
    y = ops.scan(**values, impl="triton").y
    watched = ops.scan(**values | {"x_bthp": values["x_bthp"].as_subclass(Watched)}, impl="triton").y
    assert torch.equal(watched.as_subclass(torch.Tensor), y)
    assert "mamba3.scan.default" in seen
    assert not any("empty" in name for name in seen)


def test_twice_in_one_graph_and_recomputed_in_the_backward_pass():
    values = {name: v.requires_grad_() for name, v in place(inputs(SMALL, dtype=torch.float32)).items()}
    fixed = {name: v for name, v in values.items() if name != "x_bthp"}

    def twice(x):
        return ops.scan(x, **fixed_twice(ops.scan(x, **fixed, impl="triton")))

    def fixed_twice(first):
        return fixed | {"z_bthp": first.y, "state": first.state, "impl": "triton"}

    grads = []
    for run in (twice, lambda x: checkpoint(twice, x, use_reentrant=False)):
        out = run(values["x_bthp"])
        grads.append(torch.autograd.grad(out.y.sum() + out.state.S.sum(), list(values.values())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    first = ops.scan(**values, impl="chunked")
    second = ops.scan(**values | {"z_bthp": first.y}, state=first.state, impl="chunked")
    expected = torch.autograd.grad(second.y.sum() + second.state.S.sum(), list(values.values()))
    for ours, true in zip(grads[0], expected, strict=True):
        assert distance(ours, true) < 1e-5


def test_a_second_derivative_is_refused():
    values = {name: v.requires_grad_() for name, v in place(inputs(SMALL, dtype=torch.float32)).items()}
    y = ops.scan(**values, impl="triton").y
    (grad,) = torch.autograd.grad(y.sum(), values["x_bthp"], create_graph=True)
    with pytest.raises(RuntimeError, match="take impl='chunked'"):
        grad.sum().backward()


@pytest.mark.parametrize("settings", [{}, dict(mimo_rank=2, out_norm="pre_gate", ngroups=2)])
def test_the_layer_trains_with_the_kernels_as_with_chunked(settings, monkeypatch):
    layer = Mamba3(d_model=16, d_state=16, headdim=16, **settings, dtype=torch.float32, device=DEVICE)
    u, weight = torch.randn(2, 2, 21, 16, device=DEVICE).unbind(0)

    def grads(impl, dtype=torch.float32):
        monkeypatch.setattr(mixer, "run_scan", lambda *a, **more: run_scan(*a, impl=impl, **more))
        leaf = u.to(dtype).requires_grad_()
        return torch.autograd.grad((layer.to(dtype)(leaf) * weight).sum(), [leaf, *layer.parameters()])

    ours, theirs, truth = grads("triton"), grads("chunked"), grads("chunked", torch.float64)
    for mine, yardstick, true in zip(ours, theirs, truth, strict=True):
        assert distance(mine, true) <= 2 * distance(yardstick, true) + FLOOR


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("t", [1, 63, 64, 65, 4097])
def test_on_the_device_at_the_model_s_sizes(t, rank):
    s = Sizes(b=1 if t > 65 else 4, t=t, per_group=2 if t > 65 else 8, p=64, n=128, a=32, r=rank)
    for dtype in (torch.bfloat16, torch.float16):
        values, state = place(inputs(s, dtype=dtype)), random_state(s, dtype=dtype).to(DEVICE)
        assert_within_twice_the_chunked_error(values, state if t != 4097 else None)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor itself uses torch.jit
def test_training_compiles_and_goes_into_a_cuda_graph():
    s = Sizes(b=2, t=130, per_group=2, p=64, n=128, a=32)
    values = {name: v.requires_grad_() for name, v in place(inputs(s, dtype=torch.bfloat16)).items()}
    leaves = list(values.values())

    def train(values):
        return torch.autograd.grad(ops.scan(**values, impl="triton").y.float().square().sum(), leaves)

    eager = train(values)
    compiled = torch.compile(lambda v: ops.scan(**v, impl="triton").y.float().square().sum(), fullgraph=True)
    for ours, true in zip(torch.autograd.grad(compiled(values), leaves), eager, strict=True):
        assert distance(ours, true) < 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(values)
    for v in captured:
        v.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 4])
def test_memory_of_a_long_sequence(rank):
    """131,072 tokens at the sizes of the 1.5B layer: inputs, results and gradients are 6 GiB and the kernels add little."""
    b, t, h, p, n, a = 1, 131072, 64, 64, 128, 32
    like = dict(device="cuda", dtype=torch.bfloat16)
    values = {
        "x_bthp": torch.randn(b, t, h, p, **like), "z_bthp": torch.randn(b, t, h, p, **like),
        "dt_bth": torch.rand(b, t, h, device="cuda") * 0.1, "A_bth": -torch.rand(b, t, h, device="cuda"),
        "lam_bth": torch.rand(b, t, h, device="cuda"), "theta_bta": torch.randn(b, t, a, device="cuda"),
        "B_btrgn": torch.randn(b, t, rank, 1, n, **like), "C_btrgn": torch.randn(b, t, rank, 1, n, **like),
    }  # fmt: skip
    if rank > 1:
        values |= {name: torch.rand(h, rank, p, device="cuda") for name in ("mimo_x_hrp", "mimo_z_hrp", "mimo_o_hrp")}
    leaves = [v.requires_grad_() for v in values.values()]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - sum(v.nbytes for v in leaves)
    y = ops.scan(**values, impl="triton").y
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert torch.cuda.max_memory_allocated() - before <= (8 if rank == 1 else 9) * 2**30
