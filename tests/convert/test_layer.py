"""Laws of converting a layer: it computes what the official one does, in either layout, and comes back bit for bit."""

import copy
from functools import partial

import pytest
import torch

from mamba3 import Mamba3
from mamba3.convert import layer_from_official, layer_to_official
from mamba3.nn import mixer
from mamba3.ops.scan import run_scan
from tests.convert.official import LAYERS, golden_layer, oracle_layer, random_layer, relative_error, under

BOUND = 1e-10
SMALL = {"d_model": 24, "d_state": 16, "headdim": 8, "decay": "heavy_tail"}
VARIANTS = {
    "two groups": {"ngroups": 2},
    "two groups, MIMO": {"ngroups": 2, "is_mimo": True, "mimo_rank": 3},
    "one rank of MIMO": {"is_mimo": True, "mimo_rank": 1},
    "one rank of MIMO with norm": {"is_mimo": True, "mimo_rank": 1, "is_outproj_norm": True},
    "five pairs of twenty channels": {"d_state": 20},
    "five pairs of twenty channels, MIMO": {"d_state": 20, "is_mimo": True, "mimo_rank": 2},
    "an odd split": {"d_state": 22},
    "an odd split, MIMO": {"d_state": 22, "is_mimo": True, "mimo_rank": 2},
    "odd channels, all turned but one": {"d_state": 9, "rope_fraction": 1.0},
    "odd channels, MIMO": {"d_state": 9, "rope_fraction": 1.0, "is_mimo": True, "mimo_rank": 2},
    "all channels turned": {"rope_fraction": 1.0},
    "all channels turned, MIMO": {"rope_fraction": 1.0, "is_mimo": True, "mimo_rank": 2},
    "norm, MIMO": {"is_mimo": True, "mimo_rank": 4, "is_outproj_norm": True},
    "softplus": {"decay": "softplus"},
    "softplus, MIMO": {"decay": "softplus", "is_mimo": True, "mimo_rank": 2, "is_outproj_norm": True},
    "a high floor": {"A_floor": 1.2},
    "wide": {"expand": 3, "ngroups": 3},
    "an expand that is rounded down": {"expand": 1.34, "headdim": 16},
}


@pytest.fixture(params=["chunked", "reference"])
def implementation(request, monkeypatch):
    """The layer's recurrence by each implementation."""
    monkeypatch.setattr(mixer, "run_scan", partial(run_scan, impl=request.param))
    return request.param


def official_gradients(layer):
    """The gradient of every parameter, in the official order of channels: the order is linear in the parameters."""
    carrier = copy.deepcopy(layer)
    carrier.load_state_dict({name: parameter.grad for name, parameter in layer.named_parameters()})
    return layer_to_official(carrier)[1]


def build(**changes):
    config = {**SMALL, **changes}
    return config, random_layer(config)


@pytest.mark.parametrize("name", LAYERS)
def test_golden_outputs_and_gradients(name, implementation):
    config, tensors = golden_layer(name)
    layer = layer_from_official(config, under(tensors, "param."))
    u = tensors["u"].requires_grad_()
    y = layer(u)
    y.backward(tensors["grad_y"])
    ours = {"y": y.detach(), "grad_u": u.grad}
    ours |= {f"grad.{key}": value for key, value in official_gradients(layer).items()}
    expected = {key: value for key, value in tensors.items() if key in ("y", "grad_u") or key.startswith("grad.")}
    assert ours.keys() == expected.keys()
    errors = {key: relative_error(ours[key], value) for key, value in expected.items()}
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_golden_by_steps_and_in_two_parts(name):
    config, tensors = golden_layer(name)
    layer, u = layer_from_official(config, under(tensors, "param.")), tensors["u"]
    state, steps = layer.init_state(u.shape[0]), []
    for t in range(u.shape[1]):
        y, state = layer.step(u[:, t], state)
        steps.append(y)
    assert relative_error(torch.stack(steps, 1), tensors["y"]) < BOUND
    for cut in (1, 2, u.shape[1] // 2, u.shape[1] - 1):
        first, state = layer.prefill(u[:, :cut])
        second, _ = layer.prefill(u[:, cut:], state)
        assert relative_error(torch.cat([first, second], 1), tensors["y"]) < BOUND


@pytest.mark.parametrize("name", LAYERS)
def test_the_oracle_agrees_with_the_golden_vectors(name):
    config, tensors = golden_layer(name)
    assert relative_error(oracle_layer(config, under(tensors, "param."), tensors["u"]), tensors["y"]) < BOUND


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_other_configurations_agree_with_the_oracle(changes, implementation):
    config, weights = build(**changes)
    u = torch.randn(2, 19, config["d_model"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = oracle_layer(config, weights, u)
    layer = layer_from_official(config, weights)
    assert relative_error(layer(u), expected) < BOUND
    first, state = layer.prefill(u[:, :-1])
    last, _ = layer.step(u[:, -1], state)
    assert relative_error(torch.cat([first, last.unsqueeze(1)], 1), expected) < BOUND


@pytest.mark.parametrize("changes", [{"is_mimo": False}, {"is_mimo": True, "mimo_rank": 2}], ids=["siso", "mimo"])
def test_the_layout_matters(changes):
    """What the permutation is for: the same weights taken as they are compute something else."""
    config, weights = build(**changes)
    layer = layer_from_official(config, weights)
    u = torch.randn(1, 9, config["d_model"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = layer(u)
    layer.load_state_dict(weights)
    assert relative_error(layer(u), expected) > 1e-3


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_there_and_back_is_the_identity(changes):
    config, weights = build(**changes)
    layer = layer_from_official(config, weights)
    back, returned = layer_to_official(layer)
    assert returned.keys() == weights.keys()
    assert all(torch.equal(returned[name], value) for name, value in weights.items())
    effective = {name: value for name, value in config.items() if name != "expand"}
    assert effective.items() <= back.items()
    again = layer_from_official(back, returned)
    assert again.d_inner == layer.d_inner
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), layer.parameters(), strict=True))


def test_the_dtype_is_that_of_the_projection():
    config, _ = build()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        weights = random_layer(config, dtype=dtype)
        layer = layer_from_official(config, weights)
        assert layer.in_proj.weight.dtype == layer.B_norm.weight.dtype == dtype
        assert layer.dt_bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        _, returned = layer_to_official(layer)
        assert all(torch.equal(returned[name], value.to(returned[name].dtype)) for name, value in weights.items())


def test_the_weights_are_copied():
    config, weights = build()
    before = {name: value.clone() for name, value in weights.items()}
    layer = layer_from_official(config, weights)
    _, returned = layer_to_official(layer)
    for value in (*layer.state_dict().values(), *returned.values()):
        value.zero_()
    assert all(torch.equal(weights[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_arguments_without_effect():
    config, weights = build()
    inert = {
        "chunk_size": 16, "layer_idx": 3, "n_layer": 12, "dropout": 0.0, "device": None, "dtype": None,
        "fuse_pregate_headwise_norm": True, "mimo_rank": 4,
    }  # fmt: skip
    layer = layer_from_official({**config, **inert}, weights)
    assert layer.mimo_rank == 1
    settings = layer_from_official({**config, "dt_min": 1e-2, "dt_max": 0.5, "dt_init_floor": 1e-3}, weights)
    assert settings.dt_range == (1e-2, 0.5, 1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("heavy_tail", "heavy_tail"), ("heavy-tail", "heavy_tail"), ("HeavyTail", "heavy_tail"),
     ("heavy_tail_activation", "heavy_tail"), ("softplus", "softplus"), ("Softplus", "softplus")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["decay", "decay_activation"])
def test_spellings_of_the_decay(key, name, expected):
    config, weights = build()
    del config["decay"]
    assert layer_from_official({**config, key: name}, weights).decay == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": None}, "cannot be guessed"),
        ({"decay": "relu"}, "heavy_tail, softplus; it is 'relu'"),
        ({"decay_activation": "softplus"}, "two activations"),
        ({"use_rope": True, "d_conv": 4}, "no argument d_conv, use_rope"),
        ({"rope_fraction": 0.25}, "rope_fraction must be 0.5 or 1.0"),
        ({"is_mimo": "false"}, "is_mimo must be true or false"),
        ({"expand": None}, "expand must be a number"),
        ({"headdim": 7}, "multiple of headdim"),
        ({"ngroups": 5}, "multiple of ngroups"),
        ({"d_model": "24"}, "d_model must be a positive integer"),
        ({"d_state": 32}, r"in_proj.weight has shape \(\d+, 24\), not \(\d+, 24\).*B_bias|B_bias.*in_proj.weight has"),
        ({"is_mimo": True}, "missing mimo_x"),
        ({"is_outproj_norm": True}, "missing norm.weight"),
    ],
)
def test_a_config_that_does_not_fit(changes, message):
    config, weights = build()
    with pytest.raises(ValueError, match=message):
        layer_from_official({**config, **changes}, weights)


def test_a_config_without_d_model():
    config, weights = build()
    del config["d_model"]
    with pytest.raises(ValueError, match="d_model"):
        layer_from_official(config, weights)


def test_tensors_that_do_not_fit():
    config, weights = build()
    for name in weights:
        rest = {key: value for key, value in weights.items() if key != name}
        with pytest.raises(ValueError, match=f"missing {name}"):
            layer_from_official(config, rest)
        with pytest.raises(ValueError, match=rf"{name} has shape \(1,.*not"):
            layer_from_official(config, {**rest, name: weights[name][:1]})
        damaged = weights[name].clone()
        damaged.view(-1)[-1] = torch.nan
        with pytest.raises(ValueError, match=f"{name} holds NaN"):
            layer_from_official(config, {**rest, name: damaged})
        with pytest.raises(ValueError, match=f"{name}.*int8"):
            layer_from_official(config, {**rest, name: weights[name].to(torch.int8)})
    with pytest.raises(ValueError, match="unknown A_log"):
        layer_from_official(config, {**weights, "A_log": torch.zeros(6)})
    with pytest.raises(ValueError, match=r"D \(list\)"):
        layer_from_official(config, {**weights, "D": [1.0] * 6})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 0.5}, "lam is not learned"),
        ({"rotation": "standard"}, "rotation is standard"),
        ({"rotation": "none"}, "rotation is none"),
        ({"rope_fraction": 0.25}, "2 of 8 pairs rotate"),
        ({"out_norm": "post_gate"}, "out_norm is post_gate"),
        ({"d_conv": 4}, "short convolution"),
        ({"B_bias": None}, "no bias"),
    ],
)
def test_a_layer_that_the_official_one_cannot_express(settings, message):
    with pytest.raises(ValueError, match=message):
        layer_to_official(Mamba3(24, d_state=16, headdim=8, **settings))


def test_a_layer_with_constant_biases_converts():
    layer = Mamba3(24, d_state=16, headdim=8, B_bias=(0.0, 1.0), bc_bias_trainable=False)
    again = layer_from_official(*layer_to_official(layer))
    u = torch.randn(1, 5, 24)
    assert torch.equal(again(u), layer(u))


def test_an_expand_that_no_fraction_holds_exactly():
    """int(d_inner / d_model * d_model) may fall short by one; the exported expand must not."""
    for d_model in range(40, 120):
        inner = 8 * 13
        layer = Mamba3(d_model, d_state=8, headdim=8, expand=inner / d_model)
        config, weights = layer_to_official(layer)
        assert int(config["expand"] * d_model) == inner
        assert layer_from_official(config, weights).d_inner == inner
