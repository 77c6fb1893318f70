"""Tokens that may be taken back: any number of them kept is the scan of as many."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba3.ops import draft, scan
from mamba3.ops.types import Gate, Inputs
from tests.ops.cases import Sizes, distance, inputs, random_state, sizes, state_distance

EXACT = 1e-10
GATE = ("z", "mimo_z", "mimo_o")


def read(values, state):
    """`verify` of the arguments of `scan`."""
    fields = {name.rsplit("_", 1)[0]: value for name, value in values.items()}
    gate = Gate(**{name: fields.pop(name) for name in GATE if name in fields})
    return draft.verify(Inputs(**fields), gate, state)


def first(values, row, count):
    """The first tokens of one sequence."""
    moving = {k for k, v in values.items() if k.split("_")[-1].startswith("bt")}
    return {k: v[row : row + 1, :count] if k in moving else v for k, v in values.items()}


@given(sizes(max_tokens=17), st.booleans(), st.booleans(), st.data())
def test_keeping_some_tokens_is_their_scan(s, gate, tick, data):
    values, start = inputs(s, gate=gate, tick=tick), random_state(s)
    counts = data.draw(st.lists(st.integers(0, s.t), min_size=s.b, max_size=s.b))
    whole, before = scan(**values, state=start, impl="reference"), start.clone()
    y, factors = read(values, start)
    assert distance(y, whole.y) < EXACT
    assert all(torch.equal(mine, was) for mine, was in zip(start[:4], before[:4], strict=True))
    draft.accept(factors, start, torch.tensor(counts))
    for row, count in enumerate(counts):
        mine, alone = start.select([row]), before.select([row])
        if count == 0:
            assert all(torch.equal(v, w) for v, w in zip(mine[:4], alone[:4], strict=True))
        else:
            truth = scan(**first(values, row, count), state=alone, impl="reference").state
            assert state_distance(mine, truth) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3])
def test_errors_in_less_than_float64_are_those_of_the_scan(dtype, rank):
    torch.manual_seed(0)
    s = Sizes(b=3, t=8, g=2, per_group=4, p=16, n=32, a=8, r=rank)
    values, start = inputs(s, dtype=dtype), random_state(s, dtype=dtype)
    truth, scanned = (scan(**values, state=start, impl=impl) for impl in ("reference", "chunked"))
    y, factors = read(values, start)
    draft.accept(factors, start, torch.full((3,), 8))
    assert distance(y, truth.y) <= 1.5 * distance(scanned.y, truth.y)
    assert state_distance(start, truth.state) <= 1.5 * state_distance(scanned.state, truth.state)


def test_of_a_token_taken_back_nothing_remains():
    """Neither where it is not finite nor where what lies between it and the others overflows."""
    torch.manual_seed(0)
    s = Sizes(b=1, t=4)
    values, start = inputs(s), random_state(s)
    truth = scan(**first(values, 0, 2), state=start).state
    for name in ("x_bthp", "B_btrgn", "dt_bth", "theta_bta"):
        values[name][:, 2] = math.nan
    values["A_bth"][:, 3] = -1e6
    _, factors = read(values, start)
    draft.accept(factors, start, torch.tensor([2]))
    assert state_distance(start, truth) < EXACT


def test_nothing_is_asked_of_the_device():
    """On `meta` no tensor has a value, and asking for one raises: what a CUDA graph wants."""
    s = Sizes(b=2, t=5, r=2)
    values, start = inputs(s, dtype=torch.float32, device="meta"), random_state(s, dtype=torch.float32, device="meta")
    y, factors = read(values, start)
    draft.accept(factors, start, torch.zeros(2, dtype=torch.int64, device="meta"))
    assert y.shape == (2, 5, s.h, s.p)
