"""The shortcuts around linear layers give what the layers give, and pass nothing by that someone put on a layer."""

import copy

import pytest
import torch
from torch import nn

from mamba3 import Mamba3
from mamba3.nn.linear import few_rows, outputs_from, project
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


@pytest.mark.parametrize("shape", [(2, 40), (1, 5, 40), (2, 4, 40)])
@torch.no_grad()
def test_a_few_rows_of_float32_are_no_less_exact_than_the_layer(shape):
    torch.manual_seed(0)
    linear, u = nn.Linear(40, 300, bias=False), torch.randn(shape)
    found, truth = few_rows(u, linear.weight), u.double() @ linear.weight.double().T
    assert found is not None and found.shape == truth.shape and found.is_contiguous()
    assert distance(found, truth) <= 1.5 * distance(linear(u), truth)


def test_where_the_layer_is_as_good_it_is_taken():
    """More rows, fewer outputs than inputs, a gradient."""
    wide, narrow = nn.Linear(40, 300), nn.Linear(300, 40)
    with torch.no_grad():
        assert few_rows(torch.randn(9, 40), wide.weight) is None
        assert few_rows(torch.randn(2, 300), narrow.weight) is None
    assert few_rows(torch.randn(2, 40), wide.weight) is None


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
