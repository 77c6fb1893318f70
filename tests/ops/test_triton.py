"""The kernels: on a CPU in Triton's interpreter, on small shapes; with -m gpu on the device, in every dtype.

The yardstick is the chunked path's own error in the same dtype: a kernel may have twice that.
"""

import math

import pytest
import torch

from mamba3 import ops
from mamba3.nn.mixer import Mamba3
from mamba3.ops import State, chunked, reference
from mamba3.ops.types import Gate, Inputs
from mamba3.ops.validation import check_inputs
from tests.ops.cases import Sizes, distance, inputs, random_state, state_distance, tokens

pytest.importorskip("triton")
from mamba3.ops.triton import forward
from mamba3.ops.triton.launch import Launch, device_limits, power_of_2

ON_GPU = torch.cuda.is_available()
# The interpreter computes in masked lanes too, where 0 * inf is nobody's business.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter truncates to bfloat16 where devices round to nearest, so bfloat16 is held to the law on devices only.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
FLOOR = 3e-7
SHAPES = {
    "siso": Sizes(b=2, t=65, per_group=3, p=24, n=20, a=5),
    "siso, two groups, all rotated": Sizes(b=1, t=63, g=2, per_group=1, p=16, n=16, a=8),
    "mimo": Sizes(b=1, t=64, per_group=3, p=24, n=20, a=5, r=3),
    "mimo, no rotation": Sizes(b=1, t=17, per_group=2, p=5, n=7, a=0, r=2),
    "one token": Sizes(b=2, t=1, per_group=2, p=8, n=8, a=2),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels that were defined for the interpreter (tests/conftest.py) run under the same setting."""
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def place(values):
    return {name: v.to(DEVICE) for name, v in values.items()}


def arguments(values, state=None, cu_seqlens=None, out_norm="none", norm_weight=None):
    """Arguments of an implementation, from keyword arguments of `scan`."""

    def get(*names):
        return [values.get(name) for name in names]

    inp = Inputs(
        *get("x_bthp", "dt_bth", "A_bth", "lam_bth", "theta_bta", "B_btrgn", "C_btrgn", "B_bias_hrn", "C_bias_hrn"),
        *get("mimo_x_hrp", "D_h", "tick_bth"),
    )
    return check_inputs(inp, Gate(*get("z_bthp", "mimo_z_hrp", "mimo_o_hrp"), out_norm, norm_weight), state, cu_seqlens)


def assert_within_twice_the_chunked_error(args, given: bool, **options):
    inp, gate, state, boundaries = args
    truth = reference.scan(inp, gate, state, boundaries)
    yardstick = chunked.scan(inp, gate, state, boundaries)
    ours = forward.scan(inp, gate, state if given else None, boundaries, **options)
    assert distance(ours.y, truth.y) <= 2 * distance(yardstick.y, truth.y) + FLOOR
    for name in ("S", "B_prev", "x_prev"):
        pieces = (getattr(o.state, name) for o in (ours, yardstick, truth))
        mine, theirs, true = pieces
        assert distance(mine, true) <= 2 * distance(theirs, true) + FLOOR, name
    assert state_distance(ours.state._replace(S=truth.state.S, B_prev=truth.state.B_prev), truth.state) < 2e-5
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_the_reference(shape, dtype):
    s = SHAPES[shape]
    values = place(inputs(s, dtype=dtype, tick=shape == "siso"))
    assert_within_twice_the_chunked_error(arguments(values), given=False)
    state = random_state(s, dtype=dtype).to(DEVICE)
    assert_within_twice_the_chunked_error(arguments(values, state), given=True)


@pytest.mark.parametrize("gate", [False, True])
def test_without_gate_and_with_out_norm(gate):
    s = Sizes(b=1, t=40, per_group=2, p=16, n=16, a=4, r=2)
    values = place(inputs(s, dtype=torch.float32, gate=gate))
    norm = {"out_norm": "pre_gate_grouped", "norm_weight": 1 + torch.rand(s.h, s.p, device=DEVICE)} if gate else {}
    assert_within_twice_the_chunked_error(arguments(values, **norm), given=False)


def test_a_pack_is_its_sequences_and_segments_change_nothing():
    s = Sizes(b=1, t=150, per_group=2, p=16, n=16, a=4)
    boundaries = [0, 1, 2, 70, 149, 150]
    values, state = place(inputs(s, dtype=torch.float32)), random_state(s, batch=5, dtype=torch.float32).to(DEVICE)
    args = arguments(values, state, boundaries)
    whole = assert_within_twice_the_chunked_error(args, given=True, launch=Launch(16, 4, 1))
    many = device_limits(torch.device(DEVICE))._replace(multiprocessors=64)
    few = many._replace(multiprocessors=1)
    split = forward.scan(*args, launch=Launch(16, 4, 1), limits=many)
    unsplit = forward.scan(*args, launch=Launch(16, 4, 1), limits=few)
    for other in (split, unsplit):
        assert distance(other.y, whole.y) < 1e-6
        assert state_distance(other.state, whole.state) < 1e-6


def test_prefix_and_suffix_are_the_whole():
    s = Sizes(b=2, t=50, per_group=2, p=16, n=16, a=4, r=2)
    values = place(inputs(s, dtype=torch.float32))
    whole = forward.scan(*arguments(values)[:2], None, None)
    first = forward.scan(*arguments(tokens(values, 0, 19))[:2], None, None)
    second = forward.scan(*arguments(tokens(values, 19, 50), first.state))
    assert distance(torch.cat([first.y, second.y], 1), whole.y) < 1e-6
    assert state_distance(second.state, whole.state) < 2e-6


@pytest.mark.parametrize("exponent", [-1e-6, -1.0, -50.0, None])
def test_extreme_decays(exponent):
    """A dt of each token; None mixes -50 with -1e-6, where sums of large exponents must not spoil small ones."""
    s = Sizes(b=1, t=70, per_group=2, p=16, n=16, a=4)
    values = place(inputs(s, dtype=torch.float32))
    wanted = torch.full_like(values["dt_bth"], exponent or -50.0)
    if exponent is None:
        wanted[torch.rand_like(wanted) < 0.7] = -1e-6
    values["A_bth"] = wanted / values["dt_bth"]
    assert_within_twice_the_chunked_error(arguments(values), given=False)


def test_columns_of_a_projection_are_read_in_place_and_runs_are_bitwise_equal():
    s = Sizes(b=2, t=33, per_group=2, p=16, n=16, a=4)
    values = place(inputs(s, dtype=torch.float32))
    packed = torch.cat([values["z_bthp"].flatten(2), values["x_bthp"].flatten(2)], -1)
    z, x = packed.chunk(2, dim=-1)
    strided = values | {"z_bthp": z.unflatten(-1, (s.h, s.p)), "x_bthp": x.unflatten(-1, (s.h, s.p))}
    ours, again = (forward.scan(*arguments(v)[:2], None, None) for v in (values, strided))
    assert torch.equal(ours.y, again.y)
    assert all(torch.equal(a, b) for a, b in zip(ours.state[:4], again.state[:4], strict=True))


def test_asking_for_what_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values = inputs(Sizes(t=3, a=2), dtype=torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match="need a CUDA or ROCm device, not cpu"):
        ops.scan(**values, impl="triton")
    with torch.no_grad(), pytest.raises(ValueError, match="not float64"):
        ops.scan(**inputs(Sizes(t=3)), impl="triton")


LAYERS = {
    "siso": dict(d_model=24, d_state=20, headdim=24),
    "mimo, softplus, groups": dict(
        d_model=32, d_state=16, headdim=16, mimo_rank=3, rope_fraction=1.0, ngroups=2, decay="softplus"
    ),
    "fixed lam, no rotation, no bias": dict(
        d_model=32, d_state=16, headdim=16, rotation="none", lam=0.5, B_bias=None, C_bias=None
    ),
}


def layer_and_state(settings, dtype=torch.float32):
    layer = Mamba3(**settings, dtype=dtype, device=DEVICE).requires_grad_(False)
    for p in layer.parameters():
        if p.ndim != 2:
            p += 0.2 * torch.randn_like(p)
    return layer, State(*(torch.randn_like(v) for v in layer.init_state(3)[:4]))


@pytest.mark.parametrize("settings", LAYERS)
def test_the_decode_kernel_is_the_layer_between_its_projections(settings, monkeypatch):
    layer, state = layer_and_state(LAYERS[settings])
    truth, mine = layer.double(), state.clone()
    state64 = State(*(v.double() for v in state[:4]))
    u = torch.randn(2, 3, layer.d_model, device=DEVICE, dtype=torch.float64)
    monkeypatch.setattr(Mamba3, "_decodes", lambda *_: False)
    with torch.no_grad():
        expected = [truth.step(v, state64)[0] for v in u]
        layer.float()
        ours = [layer.out_proj(layer._decode(layer.in_proj(v.float()), mine).flatten(-2)) for v in u]
    assert max(distance(o, e) for o, e in zip(ours, expected, strict=True)) < 2e-6
    assert state_distance(mine, state64) < 2e-6


def test_a_16_bit_state_is_rounded_without_bias():
    """Half a unit in the last place survives as a mean over many channels; rounding to nearest would lose it."""
    layer, state = layer_and_state(LAYERS["siso"])
    narrow = state._replace(S=(100 + torch.rand_like(state.S)).bfloat16())
    wide = narrow.clone()._replace(S=narrow.S.float())  # a step moves every field on in place
    row = layer.in_proj(torch.randn(3, layer.d_model, device=DEVICE))
    layer._decode(row, wide)
    layer._decode(row, narrow)
    error = narrow.S.float() - wide.S
    assert error.abs().max() <= 0.5  # one unit of bfloat16 near 100
    assert abs(error.mean()) < 0.02


@pytest.mark.parametrize("rank", [1, 2])
def test_an_angle_that_does_not_turn_stays_as_it_is_to_the_bit(rank):
    """A factor of 1 + 1e-8 a step, from one unit of angle to another and back, is a thousandth after 100,000 steps."""
    layer, state = layer_and_state(dict(d_model=32, d_state=16, headdim=16, mimo_rank=rank))
    row = layer.in_proj(torch.randn(3, layer.d_model, device=DEVICE))
    row[:, -layer.pairs :] = 0.0
    before = state.phi.clone()
    layer._decode(row, state)
    assert torch.equal(state.phi, before)


@pytest.mark.parametrize("settings", ["siso", "mimo, softplus, groups"])
@pytest.mark.parametrize("live", [0, 1, 2, 3])
def test_sequences_of_padding_are_neither_read_nor_written(settings, live):
    """What they hold is NaN before and after; the others get the bits that they get alone."""
    layer, state = layer_and_state(LAYERS[settings])
    row, expected = layer.in_proj(torch.randn(3, layer.d_model, device=DEVICE)), state.clone()
    y_expected = layer._decode(row, expected)
    padded = state.clone().map(lambda v: v.index_fill_(0, torch.arange(live, 3, device=DEVICE), math.nan))
    y = layer._decode(row, padded, torch.tensor([live], dtype=torch.int32, device=DEVICE))
    assert torch.equal(y[:live], y_expected[:live]) and not y[live:].any()
    for mine, theirs in zip(padded[:4], expected[:4], strict=True):
        assert torch.equal(mine[:live], theirs[:live]) and mine[live:].isnan().all()


def test_decode_refuses_a_state_of_another_layer():
    layer, state = layer_and_state(LAYERS["siso"])
    row = layer.in_proj(torch.randn(3, layer.d_model, device=DEVICE))
    with pytest.raises(ValueError, match="row must have shape"):
        layer._decode(row[:, :-1], state)
    with pytest.raises(ValueError, match="must be contiguous"):
        layer._decode(row, state._replace(S=state.S.transpose(2, 3).contiguous().transpose(2, 3)))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("t", [1, 63, 64, 65, 4097])
def test_on_the_device_at_the_model_s_sizes(t, rank):
    # One token of two heads is 32 products: their rounding errors alone, ours or the yardstick's, differ by more than two.
    s = Sizes(b=1, t=t, per_group=2 if t > 1 else 32, p=64, n=128, a=32, r=rank)
    for dtype in (torch.bfloat16, torch.float16):
        values = place(inputs(s, dtype=dtype))
        ours = assert_within_twice_the_chunked_error(arguments(values), given=False)
        with torch.no_grad():
            again = ops.scan(**values)
        assert torch.equal(ours.y, again.y)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [2048, 2050])
def test_an_infinity_stays_in_its_sequence(cut):
    """Large enough for the copy engine, which takes whole boxes of 64 tokens; 2050 cuts one in two."""
    s = Sizes(b=1, t=4096, per_group=64, p=64, n=128, a=32)
    values = place(inputs(s, dtype=torch.bfloat16))
    boundaries = torch.tensor([0, cut, 4096], dtype=torch.int32, device=DEVICE)
    with torch.no_grad():
        expected = ops.scan(**values, cu_seqlens=boundaries, impl="triton").y[:, :cut]
        for name in ("x_bthp", "B_btrgn", "C_btrgn"):
            values[name][:, cut:] = float("inf")
        ours = ops.scan(**values, cu_seqlens=boundaries, impl="triton").y[:, :cut]
    assert torch.equal(ours, expected)


def test_rows_of_coefficients_are_those_of_a_length_that_kernels_are_compiled_for():
    values = place(inputs(Sizes(b=1, t=19, a=2), dtype=torch.float32))
    inp = arguments(values)[0]
    sizes = forward.Sizes(2, 1, 1, 5, 8, 2)
    table = forward.tables((0, 19), 16, 4, torch.device(DEVICE))
    assert forward.coefficients(inp, table, 16).decay.shape == (2, 32)
    assert forward.angles(inp, sizes, table, 16, None).turn.shape == (2, 32, 2)
    assert [power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
def test_a_new_length_compiles_nothing(rank, monkeypatch):
    from triton import knobs

    def run(t):
        with torch.no_grad():
            ops.scan(**place(inputs(Sizes(b=1, t=t, p=64, n=128, a=32, r=rank), dtype=torch.bfloat16)), impl="triton")

    run(130)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what["fn"].name))
    for t in (131, 1, 50, 4097):
        run(t)
    assert not compiled


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor itself uses torch.jit
def test_compile_and_cuda_graphs():
    s = Sizes(b=2, t=130, per_group=2, p=64, n=128, a=32)
    values = place(inputs(s, dtype=torch.bfloat16))
    with torch.no_grad():
        eager = ops.scan(**values).y
        compiled = torch.compile(lambda v: ops.scan(**v, impl="triton").y, fullgraph=True)
        assert torch.equal(compiled(values), eager)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.scan(**values).y
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)


@pytest.mark.gpu
def test_the_layer_s_step_takes_the_kernel_and_is_prefill():
    layer, _ = layer_and_state(dict(d_model=128, d_state=128, headdim=64, mimo_rank=2), torch.bfloat16)
    u = torch.randn(3, 9, 128, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        whole, after = layer.prefill(u)
        _, state = layer.prefill(u[:, :4])
        assert layer._decodes(u[:, 4], state)
        for t in range(4, 9):
            y, state = layer.step(u[:, t], state)
            assert distance(y, whole[:, t]) < 0.02
    assert state_distance(state, after) < 0.02


@pytest.mark.gpu
@pytest.mark.slow
def test_a_million_tokens():
    s = Sizes(b=1, t=2**20, per_group=1, p=16, n=16, a=8)
    values = place(inputs(s, dtype=torch.float32))
    with torch.no_grad():
        ours, theirs = (ops.scan(**values, impl=impl) for impl in ("triton", "chunked"))
    assert distance(ours.y, theirs.y) < 1e-5
    assert state_distance(ours.state, theirs.state) < 1e-3
