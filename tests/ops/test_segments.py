"""Segments: the merge is associative and equals the scan."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba3.ops import State, apply, merge, scan, summarize
from tests.ops.cases import distance, inputs, random_state, sizes, state_distance, tokens

EXACT = 1e-10
SUMMARY_ARGUMENTS = (
    "x_bthp",
    "dt_bth",
    "A_bth",
    "lam_bth",
    "theta_bta",
    "B_btrgn",
    "B_bias_hrn",
    "mimo_x_hrp",
    "tick_bth",
)


def summary_of(values, start, stop):
    return summarize(**{name: v for name, v in tokens(values, start, stop).items() if name in SUMMARY_ARGUMENTS})


def as_state(summary):
    return State(summary.phi, summary.S, summary.B_last, summary.x_last)


@given(sizes(), st.data())
def test_merge_of_any_bracketing_is_the_scan(s, data):
    values, start = inputs(s, tick=True), random_state(s)
    mimo = values.get("mimo_x_hrp")
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, s.t - 1), max_size=2))), s.t] if s.t > 1 else [0, 1]
    parts = [summary_of(values, a, b) for a, b in itertools.pairwise(cuts)]
    left, right = parts[0], parts[-1]
    for part in parts[1:]:
        left = merge(left, part, mimo)
    for part in reversed(parts[:-1]):
        right = merge(part, right, mimo)
    assert state_distance(as_state(left), as_state(right)) < EXACT
    assert distance(left.log_decay, right.log_decay) < EXACT
    assert state_distance(as_state(left), as_state(summary_of(values, 0, s.t))) < EXACT
    assert state_distance(apply(start, left, mimo), scan(**values, state=start).state) < EXACT


@given(sizes(max_tokens=65))
def test_gradients_go_through_the_merge(s):
    values, start = inputs(s), random_state(s)
    leaves = [values[name] for name in ("x_bthp", "dt_bth", "lam_bth", "theta_bta", "B_btrgn")] + [
        start.S,
        start.B_prev,
    ]
    for v in leaves:
        v.requires_grad_()
    mimo, cut = values.get("mimo_x_hrp"), max(1, s.t // 2)
    merged = summary_of(values, 0, cut)
    if cut < s.t:
        merged = merge(merged, summary_of(values, cut, s.t), mimo)
    weights = torch.randn_like(start.S)
    ours = torch.autograd.grad((apply(start, merged, mimo).S * weights).sum(), leaves, allow_unused=True)
    truth = torch.autograd.grad(
        (scan(**values, state=start, impl="reference").state.S * weights).sum(), leaves, allow_unused=True
    )
    for grad, true in zip(ours, truth, strict=True):
        assert true is None or distance(grad, true) < EXACT
