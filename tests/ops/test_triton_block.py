"""What a block does beside its matrix products, in one pass: the laws are PyTorch's own functions in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from mamba3.nn.mixer import Mamba3
from mamba3.ops.discretize import decay_rate
from tests.ops.cases import distance
from tests.ops.test_triton import DEVICE, DTYPES, LAYERS, interpreted  # noqa: F401

pytest.importorskip("triton")
from mamba3.ops.triton import block

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("interpreted")]
# Half a unit in the last place, and what the steps in float32 add.
ROUNDING = {torch.float32: 4e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [24, 64])
def test_the_sum_and_its_norm(dtype, size):
    h, y = torch.randn(2, 3, size, device=DEVICE), torch.randn(2, 3, size, device=DEVICE).to(dtype)
    weight = (1 + 0.3 * torch.randn(size, device=DEVICE)).to(dtype)
    u, total = block.add_norm(h, y, weight, 1e-5, dtype)
    assert torch.equal(total, h + y)
    expected = F.rms_norm((h + y).double(), (size,), weight.double(), 1e-5)
    assert u.dtype == dtype and distance(u, expected) < ROUNDING[dtype]
    alone, same = block.add_norm(total, None, weight, 1e-5, dtype)
    assert same is total and torch.equal(alone, u)


def test_a_narrow_stream_is_normalised_as_it_is_kept():
    h, y = (100 * torch.randn(4, 32, device=DEVICE).half() for _ in range(2))
    u, total = block.add_norm(h, y, torch.ones(32, device=DEVICE), 1e-5, torch.float32)
    assert torch.equal(total, h + y)
    assert distance(u, F.rms_norm(total.double(), (32,), eps=1e-5)) < ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gated_product(dtype):
    v = (3 * torch.randn(2, 5, 2 * 40, device=DEVICE)).to(dtype)
    value, gate = v.double().chunk(2, dim=-1)
    assert distance(block.swiglu(v), value * F.silu(gate)) < ROUNDING[dtype]


@pytest.mark.parametrize("settings", LAYERS)
def test_the_in_proj_row_as_the_recurrence_takes_it(settings):
    """Columns of a wider tensor, raw values over all branches of the activations, small ones too."""
    layer = Mamba3(**LAYERS[settings], device=DEVICE).requires_grad_(False)
    for norm in (layer.B_norm, layer.C_norm):
        norm.weight += 0.3 * torch.randn_like(norm.weight)
    rows = 4 * torch.randn(2, 7, sum(layer.splits) + 5, device=DEVICE)
    rows[0] *= 10.0 ** -torch.randint(0, 6, (7, 1), device=DEVICE)
    row = type(layer.splits)(*rows[..., : sum(layer.splits)].split(layer.splits, dim=-1))
    groups = (layer.mimo_rank, layer.ngroups, layer.d_state)
    fixed = None if layer.lam == "learned" else layer.lam
    dt, A, lam, theta, B, C = block.activations(
        row.B, row.C, row.dt, row.A, row.lam, row.theta, layer.dt_bias, layer.B_norm.weight, layer.C_norm.weight,
        groups=groups, decay=layer.decay, A_floor=layer.A_floor, fixed_lam=fixed,
    )  # fmt: skip
    wide = type(row)(*(v.double() for v in row))
    true_lam = wide.lam.sigmoid() if fixed is None else torch.full_like(wide.dt, fixed)
    vectors = [
        F.rms_norm(v.unflatten(-1, groups), groups[2:], n.weight.double(), 1e-5)
        for v, n in ((wide.B, layer.B_norm), (wide.C, layer.C_norm))
    ]
    expected = (
        F.softplus(wide.dt + layer.dt_bias), decay_rate(wide.A, layer.decay, layer.A_floor), true_lam,
        math.pi * wide.theta.tanh(), *vectors,
    )  # fmt: skip
    for ours, true in zip((dt, A, lam, theta, B, C), expected, strict=True):
        assert ours.shape == true.shape
        assert ((ours.double() - true).abs() <= 1e-6 * true.abs()).all() or distance(ours, true) < 4e-7
    assert ((dt.double() - expected[0]).abs() <= 1e-6 * expected[0]).all()
    if theta.numel():
        assert ((theta.double() - expected[3]).abs() <= 1e-6 * expected[3].abs()).all()


@pytest.mark.gpu
def test_a_model_on_the_device_takes_them_and_says_what_pytorch_says(monkeypatch):
    from mamba3 import Mamba3Config, Mamba3LM
    from mamba3.nn import fused, mixer, mlp, norm

    config = Mamba3Config(vocab_size=50, d_model=64, layers=("mamba3",) * 3, d_state=32, headdim=32, d_intermediate=128)
    model, ids = Mamba3LM(config, device="cuda"), torch.randint(0, 50, (2, 70), device="cuda")
    with torch.no_grad():
        ours, state = model.prefill(ids)
        after, _ = model.step(ids[:, 0], state)
        for module in (mixer, mlp, norm):
            monkeypatch.setattr(module, "fused_rows", lambda *_: False)
        theirs, state = model.prefill(ids)
        next_theirs, _ = model.step(ids[:, 0], state)
    assert not fused.fused_rows(ids.cpu().float())
    assert distance(ours, theirs) < 1e-5 and distance(after, next_theirs) < 1e-5
