"""The shortcuts around linear layers give what the layers give, and pass nothing by that someone put on a layer."""

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from mamba3 import Mamba3
from mamba3.nn.linear import few_rows, is_plain, outputs_from, project, project_aligned, spare_columns
from tests.ops.cases import distance


class Doubled(nn.Linear):
    """What an adapter does: another forward over the same weight."""

    def forward(self, u):
        return 2 * super().forward(u)


def hooked(linear):
    linear = copy.deepcopy(linear)
    linear.register_forward_hook(lambda module, inputs, y: 2 * y)
    return linear


def wrapped(linear):
    """What offloading does: another forward on the instance."""
    linear = copy.deepcopy(linear)
    plain = linear.forward
    linear.forward = lambda u: 2 * plain(u)
    return linear


@pytest.mark.parametrize("shape", [(1, 40), (1, 1, 40)])
@torch.no_grad()
def test_one_row_of_bfloat16_is_no_less_exact_than_the_layer(shape):
    linear, u = nn.Linear(40, 300, bias=False, dtype=torch.bfloat16), torch.randn(shape, dtype=torch.bfloat16)
    truth = u.double() @ linear.weight.double().T
    assert few_rows(u, linear.weight) is not None
    assert project(linear, u).shape == linear(u).shape
    assert distance(project(linear, u), truth) <= 1.01 * distance(linear(u), truth)


@pytest.mark.parametrize("linear_is_best", [False, True])
@torch.no_grad()
def test_one_row_of_bfloat16_is_right_on_either_processor(monkeypatch, linear_is_best):
    monkeypatch.setattr("mamba3.nn.linear._linear_is_best", lambda: linear_is_best)
    linear, u = nn.Linear(40, 300, bias=False, dtype=torch.bfloat16), torch.randn(1, 1, 40, dtype=torch.bfloat16)
    expected = linear(u)[0, 0] if linear_is_best else torch.mv(linear.weight, u[0, 0])
    assert torch.equal(project(linear, u)[0, 0], expected)


@pytest.mark.parametrize("shape", [(2, 40), (1, 5, 40), (2, 2, 40)])
@torch.no_grad()
def test_a_few_rows_of_float32_are_no_less_exact_than_the_layer(monkeypatch, shape):
    monkeypatch.setattr("mamba3.nn.linear.LARGE", 40 * 300 * 4)
    torch.manual_seed(0)
    linear, u = nn.Linear(40, 300, bias=False), torch.randn(shape)
    found, truth = few_rows(u, linear.weight), u.double() @ linear.weight.double().T
    assert found is not None and found.shape == truth.shape and found.is_contiguous()
    assert distance(found, truth) <= 1.5 * distance(linear(u), truth)


def test_where_the_layer_is_as_good_it_is_taken(monkeypatch):
    """More rows, a weight that a cache holds, a gradient."""
    monkeypatch.setattr("mamba3.nn.linear.LARGE", 40 * 300 * 4)
    large, small = nn.Linear(40, 300), nn.Linear(40, 299)
    with torch.no_grad():
        assert few_rows(torch.randn(6, 40), large.weight) is None
        assert few_rows(torch.randn(2, 40), small.weight) is None
        assert few_rows(torch.randn(2, 40), large.weight) is not None
    assert few_rows(torch.randn(2, 40), large.weight) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor itself uses torch.jit
@torch.no_grad()
def test_one_row_compiles_to_one_node():
    linear, u = nn.Linear(40, 300, bias=False, dtype=torch.bfloat16), torch.randn(1, 40, dtype=torch.bfloat16)
    assert torch.equal(torch.compile(project, fullgraph=True)(linear, u), project(linear, u))


def test_one_row_is_left_to_the_layer_where_a_gradient_runs():
    linear = nn.Linear(40, 3, dtype=torch.bfloat16)
    assert few_rows(torch.randn(1, 40, dtype=torch.bfloat16), linear.weight) is None


@pytest.mark.parametrize("bias", [False, True])
def test_some_outputs_are_those_of_the_layer(bias):
    linear, u = nn.Linear(40, 30, bias=bias), torch.randn(2, 5, 40)
    assert torch.allclose(outputs_from(linear, u, 10), linear(u)[..., 10:], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_adapters_and_hooks_are_not_passed_by(dtype):
    linear, u = nn.Linear(40, 30, bias=False, dtype=dtype), torch.randn(1, 40, dtype=dtype)
    adapter = Doubled(40, 30, bias=False, dtype=dtype)
    adapter.load_state_dict(linear.state_dict())
    for changed in (adapter, hooked(linear), wrapped(linear)):
        assert torch.equal(project(changed, u), changed(u))
        assert torch.equal(outputs_from(changed, u, 10), changed(u)[..., 10:])


@torch.no_grad()
def test_the_last_token_of_a_changed_layer_is_right():
    mixer, u = Mamba3(16, d_state=8, headdim=8), torch.randn(2, 9, 16)
    mixer.in_proj = hooked(mixer.in_proj)
    last, _ = mixer.prefill_last(u)
    assert distance(last, mixer(u)[:, -1:]) < 1e-5


@pytest.fixture
def padding(monkeypatch):
    """What a GPU in 16 bits does, here: rows of whole 16 bytes. Returns how often it was asked for what it pads."""
    asked = []

    def spare(u, linear):
        wanted = -linear.out_features % 8 if is_plain(linear) and linear.bias is None and torch.is_grad_enabled() else 0
        asked.append(wanted)
        return wanted

    monkeypatch.setattr("mamba3.nn.linear.spare_columns", spare)
    return asked


def run(mixer, u, **how) -> list[Any]:
    """(y, gradient of u and of each parameter)."""
    mixer.zero_grad()
    u = u.clone().requires_grad_()
    y = mixer(u, **how)
    y.square().sum().backward()
    return [y.detach(), u.grad, *(p.grad.clone() for p in mixer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", [{}, {"cu_seqlens": [0, 7, 40]}])
def test_a_layer_with_padded_columns_is_the_layer(padding, dtype, how):
    mixer = Mamba3(16, d_state=8, headdim=8, dtype=dtype)
    u = torch.randn(1, 40, 16, dtype=dtype)
    padded, names = run(mixer, u, **how), {*mixer.state_dict()}
    assert padding == [2] and mixer.in_proj.out_features % 8 == 6
    padding.clear()
    mixer.in_proj.register_forward_hook(lambda *_: None)  # a layer with a hook is called as it is
    assert {*mixer.state_dict()} == names and mixer.in_proj.weight.shape == (94, 16)
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    assert max(distance(a, b) for a, b in zip(padded, run(mixer, u, **how), strict=True)) < bound
    assert padding == [0]


def test_padded_columns_are_zeros_whose_gradient_reaches_no_one(padding):
    linear = nn.Linear(40, 13, bias=False)
    u = torch.randn(5, 40, requires_grad=True)
    row = project_aligned(linear, u)
    assert row.shape == (5, 16) and row.stride() == (16, 1) and not row[:, 13:].any()
    row.backward(torch.ones_like(row))
    assert linear.weight.grad is not None and linear.weight.grad.shape == (13, 40) and u.grad is not None
    assert distance(linear.weight.grad, u.sum(0).expand(13, -1)) < 1e-6
    assert distance(u.grad, linear.weight.sum(0).expand(5, -1)) < 1e-6


def test_padded_columns_under_autocast_are_those_of_the_layer(padding):
    linear, u = nn.Linear(40, 13, bias=False), torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        row, y = project_aligned(linear, u), linear(u)
    assert row.dtype == y.dtype == torch.bfloat16 and row.shape == (5, 16)
    assert torch.equal(row[:, :13], y)


def test_changed_layers_and_passes_without_gradient_are_not_padded(padding):
    linear, u = nn.Linear(40, 13, bias=False), torch.randn(5, 40)
    adapter = Doubled(40, 13, bias=False)
    for changed in (adapter, hooked(linear), wrapped(linear), nn.Linear(40, 13), nn.Sequential(linear)):
        assert torch.equal(project_aligned(changed, u), changed(u))
    with torch.no_grad():
        assert project_aligned(linear, u).shape == (5, 13)
    linear.weight = nn.Parameter(linear.weight.detach())
    assert project_aligned(linear, u).shape == (5, 16)


def test_padding_is_for_a_gpu_in_16_bits(monkeypatch):
    linear = nn.Linear(40, 13, bias=False, dtype=torch.bfloat16)
    assert spare_columns(torch.randn(5, 40, dtype=torch.bfloat16), linear) == 0
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert spare_columns(on_gpu, linear) == 3
    assert spare_columns(on_gpu, nn.Linear(40, 16, bias=False, dtype=torch.bfloat16)) == 0
    assert spare_columns(on_gpu, linear.float()) == 0
    with torch.no_grad():
        assert spare_columns(on_gpu, nn.Linear(40, 13, bias=False, dtype=torch.bfloat16)) == 0
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # torch refuses it without a GPU
    assert spare_columns(on_gpu, linear) == 3


def test_padded_layers_are_recomputed_to_the_bit(padding):
    mixer, u = Mamba3(16, d_state=8, headdim=8), torch.randn(1, 40, 16)
    plain = run(mixer, u)
    mixer.forward = functools.partial(recompute, mixer.forward, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(run(mixer, u), plain, strict=True))
    assert padding == [2, 2, 2]  # once, and forward and again


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")  # of torch itself
def test_padded_layers_compile(padding):
    mixer, u = Mamba3(16, d_state=8, headdim=8), torch.randn(1, 40, 16)
    plain = run(mixer, u)
    mixer._inputs = torch.compile(mixer._inputs, backend="aot_eager")
    assert max(distance(a, b) for a, b in zip(run(mixer, u), plain, strict=True)) < 1e-5
    row = torch.compile(project_aligned, fullgraph=True, backend="aot_eager")(mixer.in_proj, u)
    assert torch.equal(row, project_aligned(mixer.in_proj, u)) and row.shape[-1] == 96


@pytest.mark.gpu
def test_padded_columns_have_the_layers_gradients_on_a_gpu():
    """Errors against float64, of y and of every gradient, are at most a little above the unpadded layer's in bfloat16."""
    mixer = Mamba3(64, d_state=16, headdim=16, device="cuda")
    u = torch.randn(2, 256, 64, device="cuda")
    truth = run(copy.deepcopy(mixer).double(), u.double())
    with torch.autocast("cuda", torch.bfloat16):
        assert spare_columns(u, mixer.in_proj) == -mixer.in_proj.out_features % 8 > 0
        padded = run(mixer, u)
        mixer.in_proj.register_forward_hook(lambda *_: None)
        plain = run(mixer, u)
    for mine, theirs, exact in zip(padded, plain, truth, strict=True):
        assert distance(mine.double(), exact) <= 1.2 * distance(theirs.double(), exact) + 1e-6
