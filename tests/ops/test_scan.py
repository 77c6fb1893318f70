"""The laws of the recurrence: every implementation is the definition, and any split is the whole."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.ops import State, scan, step
from mamba3.ops.rotate import rotate_pairs, rotate_rows_, wrap
from tests.ops.cases import Sizes, distance, inputs, random_state, sizes, state_distance, token, tokens

EXACT = 1e-10


def loss_of(output, weights):
    y, state = output
    terms = [(y * weights).sum(), state.S.square().sum(), (state.B_prev * state.B_prev.detach().cos()).sum()]
    return sum(terms) + state.x_prev.square().sum() + state.phi.sum()


@given(sizes(), st.booleans(), st.booleans(), st.booleans())
def test_chunked_is_the_reference_with_every_gradient(s, gate, tick, with_state):
    values, state = inputs(s, gate=gate, tick=tick), random_state(s) if with_state else None
    leaves = [*values.values(), *(state[:4] if state else ())]
    for v in leaves:
        v.requires_grad_()
    truth = scan(**values, state=state, impl="reference")
    weights = torch.randn_like(truth.y)
    true_grads = torch.autograd.grad(loss_of(truth, weights), leaves, allow_unused=True)
    ours = scan(**values, state=state, impl="chunked")
    grads = torch.autograd.grad(loss_of(ours, weights), leaves, allow_unused=True)
    assert distance(ours.y, truth.y) < EXACT
    assert state_distance(ours.state, truth.state) < EXACT
    for grad, true in zip(grads, true_grads, strict=True):
        assert (grad is None) == (true is None)
        assert true is None or distance(grad, true) < EXACT


@given(sizes(), st.data())
def test_prefill_split_anywhere_is_the_whole(s, data):
    values, start = inputs(s), random_state(s)
    cuts = sorted(data.draw(st.sets(st.integers(1, s.t - 1), max_size=3))) if s.t > 1 else []
    whole, state, ys = scan(**values, state=start), start, []
    for a, b in zip([0, *cuts], [*cuts, s.t], strict=True):
        part = scan(**tokens(values, a, b), state=state)
        ys.append(part.y)
        state = part.state
    assert distance(torch.cat(ys, dim=1), whole.y) < EXACT
    assert state_distance(state, whole.state) < EXACT


@given(sizes(max_tokens=17), st.booleans())
def test_steps_are_the_prefill(s, inplace):
    values, start = inputs(s, tick=True), random_state(s)
    whole, state = scan(**values, state=start), start.clone()
    with torch.no_grad():
        for t in range(s.t):
            y, state = step(**token(values, t), state=state, inplace=inplace)
            assert distance(y, whole.y[:, t]) < EXACT
    assert state_distance(state, whole.state) < EXACT


@given(sizes(max_tokens=17))
def test_steps_have_the_gradients_of_the_reference(s):
    values, start = inputs(s), random_state(s)
    leaves = [*values.values(), *start[:4]]
    for v in leaves:
        v.requires_grad_()
    truth = scan(**values, state=start, impl="reference")
    weights, state, ys = torch.randn_like(truth.y), start, []
    for t in range(s.t):
        y, state = step(**token(values, t), state=state)
        ys.append(y)
    true_grads = torch.autograd.grad(loss_of(truth, weights), leaves, allow_unused=True)
    grads = torch.autograd.grad(loss_of((torch.stack(ys, 1), state), weights), leaves, allow_unused=True)
    assert max(distance(g, true) for g, true in zip(grads, true_grads, strict=True) if true is not None) < EXACT


@settings(max_examples=15)
@given(
    sizes(max_tokens=1),
    st.lists(st.integers(1, 140), min_size=1, max_size=4),
    st.sampled_from(["chunked", "reference"]),
)
def test_packed_is_separate_states_included(s, lengths, impl):
    s = Sizes(1, sum(lengths), s.g, s.per_group, s.p, s.n, s.a, s.r)
    values, start = inputs(s), random_state(s, batch=len(lengths))
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    leaves = [values["x_bthp"], values["B_btrgn"], values["dt_bth"], start.S]
    for v in leaves:
        v.requires_grad_()
    pack = scan(**values, state=start, cu_seqlens=torch.tensor(cu, dtype=torch.int32), impl=impl)
    parts = [scan(**tokens(values, a, b), state=start.select([i])) for i, (a, b) in enumerate(itertools.pairwise(cu))]
    y = torch.cat([part.y for part in parts], dim=1)
    assert distance(pack.y, y) < EXACT
    for i, part in enumerate(parts):
        assert state_distance(pack.state.select([i]), part.state) < EXACT
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((pack.y * weights).sum() + pack.state.S.sum(), leaves)
    truth = torch.autograd.grad((y * weights).sum() + sum(part.state.S.sum() for part in parts), leaves)
    assert max(distance(g, true) for g, true in zip(ours, truth, strict=True)) < EXACT


@pytest.mark.parametrize("name", ["x_bthp", "theta_bta"])
def test_a_nan_in_one_sequence_of_a_pack_reaches_no_other(name):
    s = Sizes(b=1, t=100, r=2)
    values = inputs(s)
    values[name][:, 30:40] = torch.nan
    pack = scan(**values, cu_seqlens=[0, 30, 40, 100])
    assert pack.y[:, :30].isfinite().all() and pack.y[:, 40:].isfinite().all()
    assert all(part[[0, 2]].isfinite().all() for part in pack.state[:4])
    assert pack.state.S[1].isnan().any()


@given(sizes(max_tokens=65))
def test_siso_is_mimo_of_rank_one(s):
    s = Sizes(s.b, s.t, s.g, s.per_group, s.p, s.n, s.a, r=1)
    values, one = inputs(s), torch.ones(s.h, 1, s.p, dtype=torch.float64)
    siso = scan(**values)
    mimo = scan(**values, mimo_x_hrp=one, mimo_z_hrp=one, mimo_o_hrp=one)
    assert distance(mimo.y, siso.y) < EXACT and state_distance(mimo.state, siso.state) < EXACT


@given(sizes(max_tokens=65))
def test_lambda_one_without_rotation_is_mamba2(s):
    """Mamba-2: h_t = exp(A dt) h_{t-1} + dt x (x) B, y = h C + D x, written here as one sum over the past."""
    s = Sizes(s.b, s.t, s.g, s.per_group, s.p, s.n, 0, r=1)
    v = inputs(s, gate=False)
    v["lam_bth"] = torch.ones_like(v["lam_bth"])
    del v["B_bias_hrn"], v["C_bias_hrn"]
    heads = [h // s.per_group for h in range(s.h)]
    B, C = v["B_btrgn"][:, :, 0, heads], v["C_btrgn"][:, :, 0, heads]
    sums = (v["A_bth"] * v["dt_bth"]).cumsum(1)
    decay = (sums[:, :, None] - sums[:, None]).exp() * torch.ones(s.t, s.t).tril().double()[..., None]
    y = torch.einsum("btsh,bthn,bshn,bsh,bshp->bthp", decay, C, B, v["dt_bth"], v["x_bthp"])
    y = y + v["D_h"][:, None] * v["x_bthp"]
    assert distance(scan(**v).y.squeeze(2), y) < EXACT


@given(sizes(max_tokens=65))
def test_rotation_is_the_complex_form(s):
    """Section 2: a pair is one complex channel; the state turns by exp(-i theta dt) a step, B and C stay as they are."""
    s = Sizes(s.b, s.t, s.g, s.per_group, s.p, max(s.n, 2), 0, r=1)
    s = Sizes(s.b, s.t, s.g, s.per_group, s.p, s.n - s.n % 2, s.n // 2, r=1)
    v = inputs(s, gate=False)
    del v["B_bias_hrn"], v["C_bias_hrn"], v["D_h"]
    heads, a = [h // s.per_group for h in range(s.h)], s.a
    B, C = (torch.complex(w[..., :a], w[..., a:]) for w in (v["B_btrgn"][:, :, 0, heads], v["C_btrgn"][:, :, 0, heads]))
    x, dt, lam = v["x_bthp"], v["dt_bth"], v["lam_bth"]
    state = torch.zeros(s.b, s.h, s.p, a, dtype=torch.complex128)
    entering, ys = torch.zeros_like(state), []
    for t in range(s.t):
        turn = torch.polar(torch.ones(s.b, s.h, a).double(), -v["theta_bta"][:, t, None] * dt[:, t, :, None]).unsqueeze(
            2
        )
        alpha = (v["A_bth"] * dt)[:, t].exp()[..., None, None] * turn
        now = torch.einsum("bhp,bhn->bhpn", x[:, t].to(torch.complex128), B[:, t])
        weight = ((1 - lam) * dt)[:, t][..., None, None], (lam * dt)[:, t][..., None, None]
        state = alpha * (state + weight[0] * entering) + weight[1] * now
        entering = now
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t].conj()).real)
    assert distance(scan(**v).y.squeeze(2), torch.stack(ys, dim=1)) < EXACT


@pytest.mark.parametrize(("lam", "order"), [(0.5, 2), (1.0, 1)])
def test_order_of_convergence(lam, order):
    """dS/dt = -k S + sin(t)^2, S(0) = 0: the trapezoid's error falls with the square of the step, Euler's with the step."""
    k, end = 0.7, 2.0
    lag = (k * math.cos(2 * end) + 2 * math.sin(2 * end) - k * math.exp(-k * end)) / (k * k + 4)
    exact = ((1 - math.exp(-k * end)) / k - lag) / 2

    def error(steps):
        time = torch.linspace(0, end, steps + 1, dtype=torch.float64)
        dt = torch.full((1, steps + 1, 1), end / steps, dtype=torch.float64)
        one = torch.ones(1, steps + 1, 1, 1, 1, dtype=torch.float64)
        x, theta = (time.sin() ** 2).view(1, -1, 1, 1), torch.zeros(1, steps + 1, 0, dtype=torch.float64)
        state = scan(x, dt, torch.full_like(dt, -k), torch.full_like(dt, lam), theta, one, one).state
        return abs(state.S.item() - exact)

    errors = [error(steps) for steps in (100, 200, 400)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("exponent", [-1e-6, -1.0, -50.0, "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decay(exponent, dtype):
    """A dt from -1e-6 to -50: decays stay exact however large the sum before them."""
    s = Sizes(b=1, t=130, n=6, a=2, r=2)
    values = inputs(s)
    values["dt_bth"] = torch.full_like(values["dt_bth"], 0.5)
    exponents = (
        torch.full_like(values["A_bth"], -1e-6) if exponent == "mixed" else torch.full_like(values["A_bth"], exponent)
    )
    if exponent == "mixed":
        exponents[:, :40] = -50
    values["A_bth"] = exponents / 0.5
    truth = scan(**values, impl="reference")
    ours = scan(**{name: v.to(dtype) for name, v in values.items()})
    assert distance(ours.y, truth.y) < (EXACT if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_cost_their_rounding_and_no_more(dtype):
    s = Sizes(b=2, t=200, per_group=4, p=16, n=32, a=8, r=2)
    values = inputs(s, dtype=dtype)
    truth, ours = scan(**values, impl="reference"), scan(**values)
    assert ours.y.dtype == dtype and ours.state.S.dtype == torch.float32 and ours.state.B_prev.dtype == dtype
    assert distance(ours.y, truth.y) < 4 * torch.finfo(dtype).eps
    assert distance(ours.state.S, truth.state.S) < 4 * torch.finfo(dtype).eps


def test_backward_twice():
    s = Sizes(b=1, t=20, p=2, n=4, a=1, r=2)
    values = inputs(s)
    x, dt = values.pop("x_bthp").requires_grad_(), values.pop("dt_bth").requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, dt: scan(x_bthp=x, dt_bth=dt, **values).y.sum().sin(), (x, dt), atol=1e-6
    )


def test_memory_is_linear_and_never_tokens_by_state():
    """At 64 heads, P 64, N 128 the backward keeps far less than one (tokens, H, N, P) tensor, and twice for twice."""

    def saved(t):
        s = Sizes(b=1, t=t, per_group=64, p=64, n=128, a=32)
        values = {name: v.requires_grad_() for name, v in inputs(s, dtype=torch.float32).items()}
        kept = {}

        def pack(v):
            kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
            return v

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            y = scan(**values).y
        del y
        return sum(kept.values())

    short, long = saved(512), saved(1024)
    assert long < 2.2 * short
    assert long < 0.05 * 1024 * 64 * 128 * 64 * 4


@given(st.floats(-1e4, 1e4), st.sampled_from([torch.float32, torch.float64]))
def test_wrap_is_the_angle_on_the_circle(angle, dtype):
    phi = torch.tensor(angle, dtype=dtype)
    wrapped = wrap(phi).double()
    assert abs(wrapped) <= math.pi * (1 + 1e-6)
    turn = (wrapped - phi.double()) / (2 * math.pi)
    assert abs(turn - turn.round()) < (1e-7 if dtype == torch.float32 else 1e-12)


def test_wrap_passes_the_gradient_on():
    phi = torch.tensor([7.0, -20.0], requires_grad=True)
    wrap(phi).sum().backward()
    assert phi.grad.tolist() == [1.0, 1.0]


def test_rotation_in_place_is_the_rotation():
    v, phi = torch.randn(3, 7), torch.randn(3, 2)
    turned = rotate_rows_(v.mT.clone(), phi.cos().mT, phi.sin().mT)
    assert torch.equal(turned.mT, rotate_pairs(v, phi.cos(), phi.sin()))


def test_the_state_given_is_not_changed():
    s = Sizes(t=70)
    values, state = inputs(s), random_state(s)
    before = state.clone()
    scan(**values, state=state)
    step(**token(values, 0), state=state)
    assert all(torch.equal(a, b) for a, b in zip(state[:4], before[:4], strict=True))


def test_step_in_place_updates_the_state_given():
    s = Sizes(t=1)
    values, state = inputs(s), random_state(s)
    expected = step(**token(values, 0), state=state).state
    with torch.no_grad():
        after = step(**token(values, 0), state=state, inplace=True).state
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(after[:4], state[:4], strict=True))
    assert state_distance(state, expected) < EXACT


def test_autocast_does_not_reach_the_recurrence():
    s = Sizes(t=70, n=16, p=16)
    values = inputs(s, dtype=torch.float32)
    expected = scan(**values).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scan(**values).y, expected)


def test_state_of_zeros_is_no_state():
    s = Sizes(t=30, r=3)
    values = inputs(s)
    zeros = State.zeros(s.b, nheads=s.h, headdim=s.p, d_state=s.n, pairs=s.a, rank=s.r, dtype=torch.float64)
    assert torch.equal(scan(**values, state=zeros).y, scan(**values).y)
