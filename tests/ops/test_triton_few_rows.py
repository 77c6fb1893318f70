"""Products of a row or two: in Triton's interpreter on small shapes, with -m gpu on the device, against float64.

The yardstick is the same arithmetic in PyTorch with 16-bit operands and a float32 sum: the kernel may have twice its error.
"""

import pytest
import torch
import torch.nn.functional as F

from mamba3 import Mamba3LM, preset
from mamba3.nn import GatedMLP, RMSNorm, fused, linear, mlp, norm
from tests.ops.cases import distance
from tests.ops.test_triton import DEVICE, interpreted  # noqa: F401

pytest.importorskip("triton")
from mamba3.ops.triton import few_rows

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("interpreted")]
# Triton's interpreter cuts float32 off to bfloat16 where a device rounds, so that there it would be judged for that.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
SHAPES = [(1, 48, 64), (2, 33, 100), (1, 5, 7), (2, 130, 16)]  # rows, outputs, channels


def bounded(ours, plain, truth):
    """Twice the error of the plain way, and half a unit of the narrow dtype for sums that it happens to hit."""
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    assert distance(ours, truth) <= 2 * distance(plain, truth) + torch.finfo(ours.dtype).eps / 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "channels"), SHAPES)
def test_a_product_is_that_of_the_layer(rows, outputs, channels, dtype):
    u, weight = (
        torch.randn(rows, channels, device=DEVICE).to(dtype),
        torch.randn(outputs, channels, device=DEVICE).to(dtype),
    )
    bounded(few_rows.product(u, weight), F.linear(u, weight), F.linear(u.double(), weight.double()))
    assert few_rows.product(u[:, None], weight).shape == (rows, 1, outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual", [torch.float32, None])
@pytest.mark.parametrize(("rows", "outputs", "channels"), SHAPES)
def test_norm_and_gate_are_those_of_kernels_of_their_own(rows, outputs, channels, residual, gated, dtype):
    h = torch.randn(rows, channels, device=DEVICE, dtype=residual or dtype)
    y, scale = torch.randn(rows, channels, device=DEVICE).to(dtype), torch.rand(channels, device=DEVICE).to(dtype)
    weight = torch.randn(outputs * (2 if gated else 1), channels, device=DEVICE).to(dtype)
    for add in (y, None):
        ours, total = few_rows.normed_product(h, add, scale, 1e-5, weight, gated=gated)
        expected = h if add is None else h + add
        assert torch.equal(total, expected) and (add is not None or total is h)

        def way(v, narrow, weight=weight, scale=scale):
            u = F.rms_norm(v, (v.shape[-1],), scale.to(v.dtype), 1e-5)
            u = F.linear(u.to(weight.dtype) if narrow else u, weight if narrow else weight.double())
            value, gate = u.chunk(2, dim=-1) if gated else (u, None)
            return value if gate is None else value * F.silu(gate)

        bounded(ours, way(expected.float(), True), way(expected.double(), False))


@pytest.fixture
def forced(monkeypatch):
    """The kernels' conditions but for the device; how often one was asked for."""
    asked = []

    def takes(u, weight, *others):
        fits = u.shape[-1] == weight.shape[1] and u.numel() <= few_rows.MOST_ROWS * weight.shape[1]
        asked.append(fits)
        return fits and weight.element_size() == 2 and not torch.is_grad_enabled()

    for room in (fused, linear, norm):
        monkeypatch.setattr(room, "fused_products", takes)
    return asked


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
@torch.no_grad()
def test_a_step_with_the_kernel_is_the_step_without(kind, forced, monkeypatch):
    layers = ("mamba3", "attention") if kind == "hybrid" else ("mamba3",) * 2
    sizes = dict(vocab_size=50, d_model=32, layers=layers, d_state=16, headdim=16, d_intermediate=128, attn_heads=2)
    model = Mamba3LM(preset("siso-180m", **sizes), device=DEVICE, dtype=torch.float16)
    ids = torch.randint(0, 50, (2, 9), device=DEVICE)
    _, before = model.prefill(ids)
    ours, _ = model.step(ids[:, 0], before.clone())
    assert forced.count(True) >= 4 * 2 + 1
    many, _ = model.step(ids[[0, 1, 0], 0], before.select([0, 1, 0]))
    assert distance(ours, many[:2]) < 0.02 and not torch.equal(ours, torch.zeros_like(ours))


@torch.no_grad()
def test_what_someone_put_on_a_layer_is_not_passed_by(forced):
    block, rms = GatedMLP(32, 128, DEVICE, torch.bfloat16), RMSNorm(32, device=DEVICE, dtype=torch.bfloat16)
    h = torch.randn(1, 32, device=DEVICE)
    plain, _ = block.after(rms, h, None, torch.bfloat16)
    block.fc1.register_forward_hook(lambda module, inputs, y: torch.zeros_like(y))
    assert plain.any() and not block.after(rms, h, None, torch.bfloat16)[0].any()
    block = GatedMLP(32, 128, DEVICE, torch.bfloat16)
    block.register_forward_hook(lambda module, inputs, y: torch.zeros_like(y))
    assert not block.after(rms, h, None, torch.bfloat16)[0].any()
    assert mlp.is_untouched(rms)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_kernels_that_begin_early_wait_for_what_they_need(rank, rows):
    """The same tokens alone, where each kernel begins before the one in front has ended, and among three, where none does:
    300 steps in a row, then as replays of a graph."""
    sizes = dict(vocab_size=500, d_model=512, layers=("mamba3",) * 4, d_intermediate=1024, mimo_rank=rank)
    model = Mamba3LM(preset("siso-180m", **sizes), device="cuda", dtype=torch.bfloat16)
    ids, token = torch.randint(0, 500, (300, 3), device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
    state, many = model.init_state(rows), model.init_state(3)
    graph = torch.cuda.CUDAGraph()
    model.step(token, model.init_state(rows))
    with torch.cuda.graph(graph):
        out = model.step(token, state)[0]
    for i, row in enumerate(ids):
        token.copy_(row[:rows])
        if i < 150:
            ours = model.step(token, state)[0]
        else:
            graph.replay()
            ours = out
        assert distance(ours, model.step(row, many)[0][:rows]) < 0.04
    for mine, theirs in zip(state.layers, many.layers, strict=True):
        assert distance(mine.S, theirs.S[:rows]) < 0.02 and distance(mine.x_prev, theirs.x_prev[:rows]) < 0.04
