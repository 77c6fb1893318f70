"""The layer: its three verbs agree for every setting, and it survives what people do to modules."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3 import Mamba3
from mamba3.nn.init import softplus_inverse
from tests.ops.cases import distance, state_distance

SMALL = {"d_model": 16, "d_state": 8, "headdim": 8}
SETTINGS = {
    "siso": {},
    "mimo": {"mimo_rank": 3},
    "mimo of rank one": {"mimo": True},
    "groups": {"ngroups": 2, "mimo_rank": 2},
    "full rope": {"rope_fraction": 1.0},
    "odd state": {"d_state": 7, "rope_fraction": 1.0},
    "softplus": {"decay": "softplus"},
    "trapezoid": {"lam": 0.5},
    "euler": {"lam": 1.0},
    "standard rope": {"rotation": "standard"},
    "no rotation": {"rotation": "none", "mimo_rank": 2},
    "no biases": {"B_bias": None, "C_bias": None},
    "B bias only": {"C_bias": None},
    "constant biases": {"bc_bias_trainable": False},
    "random biases": {"B_bias": (-1.0, 1.0), "C_bias": (0.0, 1.0)},
    "short convolution": {"d_conv": 4, "mimo_rank": 2},
    **{f"out norm {norm}": {"out_norm": norm, "mimo_rank": rank}
       for norm in ("pre_gate", "pre_gate_grouped", "post_gate", "post_gate_grouped") for rank in (1, 2)},
}  # fmt: skip


def layer(**settings):
    torch.manual_seed(1)
    made = Mamba3(**{**SMALL, **settings}, dtype=torch.float64)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


@pytest.mark.parametrize("name", SETTINGS)
def test_three_verbs_agree(name):
    mixer = layer(**SETTINGS[name])
    u = torch.randn(2, 70, 16, dtype=torch.float64)
    whole = mixer(u)
    first, state = mixer.prefill(u[:, :33])
    second, state = mixer.prefill(u[:, 33:66], state)
    rest = []
    with torch.no_grad():
        for t in range(66, 70):
            y, state = mixer.step(u[:, t], state)
            rest.append(y)
    assert distance(torch.cat([first, second, torch.stack(rest, 1)], dim=1), whole) < 1e-10
    assert state_distance(state, mixer.prefill(u)[1]) < 1e-10
    last, last_state = mixer.prefill_last(u[:, 33:], mixer.prefill(u[:, :33])[1])
    assert distance(last, whole[:, -1:]) < 1e-10
    assert state_distance(last_state, state) < 1e-10
    pack, packed_state = mixer.prefill(u.reshape(1, 140, 16), cu_seqlens=[0, 70, 140])
    assert distance(pack.view_as(whole), whole) < 1e-10
    assert state_distance(packed_state, state) < 1e-10
    assert distance(mixer(u.reshape(1, 140, 16), cu_seqlens=torch.tensor([0, 70, 140])).view_as(whole), whole) < 1e-10


@pytest.mark.parametrize("name", SETTINGS)
def test_every_parameter_learns(name):
    mixer = layer(**SETTINGS[name])
    mixer(torch.randn(2, 20, 16, dtype=torch.float64)).square().sum().backward()
    silent = [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@settings(max_examples=10)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.sampled_from(["siso", "mimo", "short convolution"]))
def test_packs_with_states_are_separate(lengths, name):
    mixer = layer(**SETTINGS[name])
    pieces = [torch.randn(1, n, 16, dtype=torch.float64) for n in lengths]
    cu = list(itertools.accumulate(lengths, initial=0))
    pack = torch.cat(pieces, dim=1)
    _, state = mixer.prefill(pack, cu_seqlens=cu)
    y, _ = mixer.prefill(pack, state, cu_seqlens=cu)
    for i, piece in enumerate(pieces):
        _, alone = mixer.prefill(piece)
        again, _ = mixer.prefill(piece, alone)
        assert distance(y[:, cu[i] : cu[i + 1]], again) < 1e-10


def test_gradients_flow_through_the_state():
    mixer, u = layer(mimo_rank=2), torch.randn(1, 12, 16, dtype=torch.float64)
    grads = []
    for split in (None, 5):
        v = u.clone().requires_grad_()
        y = mixer(v) if split is None else mixer.prefill(v[:, split:], mixer.prefill(v[:, :split])[1])[0]
        grads.append(torch.autograd.grad(y[:, -1].sum(), v)[0])
    assert distance(grads[1], grads[0]) < 1e-10
    v = u.clone().requires_grad_()
    state = mixer.init_state(1)
    for t in range(12):
        y, state = mixer.step(v[:, t], state)
    assert distance(torch.autograd.grad(y.sum(), v)[0], grads[0]) < 1e-10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"headdim": 5}, "multiple of headdim = 5"),
        ({"ngroups": 3}, "multiple of ngroups = 3"),
        ({"mimo_rank": 0}, "mimo_rank must be a positive integer"),
        ({"d_state": 2.5}, "d_state must be a positive integer"),
        ({"rope_fraction": 0.0}, "rotation='none'"),
        ({"rope_fraction": 1.5}, "rope_fraction must lie in"),
        ({"d_state": 1}, "leave at least one pair"),
        ({"decay": "relu"}, "decay must be one of heavy_tail, softplus; it is 'relu'"),
        ({"out_norm": "both"}, "out_norm must be one of"),
        ({"rotation": "rope"}, "rotation must be one of"),
        ({"lam": "half"}, "lam must be 'learned' or a number"),
        ({"lam": 2.0}, "lam must be 'learned' or a number"),
        ({"d_conv": 1}, "d_conv must be 0"),
        ({"A_floor": 0.0}, "A_floor must be positive"),
        ({"dt_min": 0.2}, "dt_min <= dt_max"),
    ],
)
def test_constructor_says_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        Mamba3(**{**SMALL, **settings})


def test_inputs_that_do_not_fit():
    mixer = Mamba3(**SMALL)
    with pytest.raises(ValueError, match=r"\[b, t, d_model\] with d_model = 16; it came with shape \(2, 16\)"):
        mixer(torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"\[b, d_model\] with d_model = 16"):
        mixer.step(torch.zeros(2, 3, 16), mixer.init_state(2))
    with pytest.raises(ValueError, match="must end at the number of tokens"):
        mixer(torch.zeros(1, 5, 16), cu_seqlens=[0, 4])
    with pytest.raises(ValueError, match=r"state\.phi has s = 3"):
        mixer.prefill(torch.zeros(2, 4, 16), mixer.init_state(3))
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        mixer.init_state(0)
    with pytest.raises(ValueError, match="the state has no conv"):
        Mamba3(**SMALL, d_conv=4).prefill(torch.zeros(2, 4, 16), mixer.init_state(2))


def test_initial_values():
    mixer = Mamba3(64, d_state=16, headdim=8, mimo_rank=4, dt_min=1e-3, dt_max=1e-1)
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001
    for p, value in ((mixer.B_bias, 1), (mixer.C_bias, 1), (mixer.D, 1), (mixer.mimo_x, 0.25), (mixer.mimo_o, 0.25)):
        assert (p == value).all()
    assert (mixer.mimo_z == 1).all()
    assert softplus_inverse(dt).allclose(mixer.dt_bias, atol=1e-6)


def test_decay_never_lets_the_state_grow():
    """The trap of section 1: -softplus(v) clamped wrongly would make A positive."""
    mixer = layer(decay="softplus")
    with torch.no_grad():
        mixer.in_proj.weight.mul_(100)
    _, state = mixer.prefill(torch.randn(1, 50, 16, dtype=torch.float64))
    decayed = mixer.prefill(torch.zeros(1, 5000, 16, dtype=torch.float64), state)[1]
    assert decayed.S.abs().sum() < state.S.abs().sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    exact, u = layer(mimo_rank=2), torch.randn(1, 40, 16, dtype=torch.float64)
    cast = copy.deepcopy(exact).to(dtype)
    y, state = cast.prefill(u.to(dtype))
    assert y.dtype == dtype and state.S.dtype == torch.float32
    assert distance(y, copy.deepcopy(cast).double()(u.to(dtype).double())) < 8 * torch.finfo(dtype).eps
    made = Mamba3(**SMALL, dtype=dtype)
    assert made.in_proj.weight.dtype == dtype and made.dt_bias.dtype == torch.float32


def test_autocast_trains():
    mixer, u = Mamba3(**SMALL, mimo_rank=2), torch.randn(2, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(u)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in mixer.parameters())
    assert distance(y, mixer(u)) < 0.05


def test_modules_are_copied_pickled_and_built_without_memory():
    mixer, u = layer(mimo_rank=2), torch.randn(1, 9, 16, dtype=torch.float64)
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(twin(u), mixer(u))
    state = mixer.prefill(u)[1]
    assert torch.equal(pickle.loads(pickle.dumps(state)).S, state.S)
    with torch.device("meta"):
        ghost = Mamba3(**SMALL, mimo_rank=2)
    assert all(p.is_meta for p in ghost.parameters())
    ghost.to_empty(device="cpu").reset_parameters()
    assert all(p.isfinite().all() for p in ghost.parameters())
    assert not any(p.is_meta for p in Mamba3(**SMALL, device="cpu").parameters())


@pytest.mark.parametrize("kind", [{}, {"mimo_rank": 2, "ngroups": 2}])
# torch 2.13: Dynamo itself instantiates the autograd.Function that it traces, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(kind):
    """One graph for each verb, forward and backward, with the same result."""
    mixer, u = layer(**kind).float(), torch.randn(2, 70, 16)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    expected = mixer(u)
    y = compiled(u)
    assert distance(y, expected) < 1e-5
    mixer.zero_grad()
    y.square().sum().backward()
    ours = {n: p.grad.clone() for n, p in mixer.named_parameters()}
    mixer.zero_grad()
    expected.square().sum().backward()
    assert max(distance(ours[n], p.grad) for n, p in mixer.named_parameters()) < 1e-4
    state = mixer.prefill(u)[1].detach()
    prefill = torch.compile(mixer.prefill, fullgraph=True, backend="aot_eager")
    assert distance(prefill(u, state)[0], mixer.prefill(u, state)[0]) < 1e-5
    with torch.no_grad():
        step = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
        ours, theirs = state.clone(), state.clone()
        for t in range(3):
            assert distance(step(u[:, t], ours)[0], mixer.step(u[:, t], theirs)[0]) < 1e-5
        assert state_distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", ["mimo", "short convolution"])
def test_a_state_keeps_nothing_else_alive(name):
    """A view of the last token would hold the projections of the whole prompt."""
    mixer = layer(**SETTINGS[name])
    with torch.no_grad():
        _, state = mixer.prefill(torch.randn(1, 500, 16, dtype=torch.float64))
    held = sum(v.untyped_storage().nbytes() for v in state if v is not None)
    assert held == state.nbytes


@pytest.mark.parametrize("setting", [{}, {"mimo_rank": 2}, {"rotation": "standard"}, {"B_bias": None, "C_bias": None}])
def test_vmap_over_stacked_parameters_is_separate_layers(setting):
    """torch.vmap maps the layer over a stack of parameters: outputs and gradients are those of each layer alone."""
    layers = [Mamba3(8, 8, headdim=4, **setting, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    u = torch.randn(2, 70, 8, dtype=torch.float64)

    def apply(own, constants):
        return torch.func.functional_call(layers[0], (own, constants), (u,))

    y = torch.vmap(apply)(parameters, buffers)
    gradients = torch.autograd.grad(y.square().sum(), list(parameters.values()))
    for i, layer in enumerate(layers):
        alone = layer(u)
        expected = torch.autograd.grad(alone.square().sum(), list(layer.parameters()))
        torch.testing.assert_close(y[i], alone, rtol=1e-10, atol=1e-12)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_kept_of_those_verified_are_prefilled(name):
    mixer = layer(**SETTINGS[name])
    u = torch.randn(3, 12, 16, dtype=torch.float64)
    _, state = mixer.prefill(u[:, :7])
    state = state.detach()
    whole, _ = mixer.prefill(u[:, 7:], state)
    mine = state.clone()
    y, read = mixer.verify(u[:, 7:], mine)
    assert distance(y, whole) < 1e-10
    mixer.accept(read, mine, torch.tensor([0, 2, 5]))
    for row, count in enumerate([0, 2, 5]):
        alone = state.select([row])
        if count:
            _, alone = mixer.prefill(u[row : row + 1, 7 : 7 + count], alone)
        found = mine.select([row])
        assert state_distance(found, alone) < 1e-10
        assert found.conv is None or distance(found.conv, alone.conv) < 1e-10


def test_a_layer_refuses_no_tokens_and_a_state_of_other_sequences():
    layer = Mamba3(64, 16, headdim=16)
    for shape in ((0, 3, 64), (2, 0, 64)):
        with pytest.raises(ValueError, match="At least one sequence of at least one token"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"state\.phi has s = 3"):
        layer.prefill(torch.zeros(2, 3, 64), layer.init_state(3))
    with pytest.raises(ValueError, match=r"state\.phi has s = 1"):
        layer.prefill(torch.zeros(1, 3, 64), layer.init_state(1), [0, 1, 3])
