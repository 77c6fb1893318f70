"""The draws: the right distribution, filters and penalties as in the plain loop, rows that do not see each other."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba3.engine.noise import draw_key, gumbel, uniform
from mamba3.engine.request import SamplingParams
from mamba3.engine.sampler import Draws, kept_logits, sample
from mamba3.lm.generate import filter_logits, penalize

LOGITS = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0], dtype=torch.float64)


def draw(params: SamplingParams, count: int, logits=LOGITS) -> torch.Tensor:
    rows = [Draws(params, seed) for seed in range(count)]
    return torch.tensor([choice.token for choice in sample(logits.expand(count, -1), rows)])


def chi_square(counts: torch.Tensor, probability: torch.Tensor) -> float:
    expected = probability * counts.sum()
    kept = expected > 0
    assert not counts[~kept].any()
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_draws_follow_the_filtered_distribution(settings):
    params = SamplingParams(**{"temperature": 1.0, **settings})
    counts = torch.bincount(draw(params, 20_000), minlength=5).double()
    assert chi_square(counts, filter_logits(LOGITS[None], params.filters)[0].softmax(-1)) < 18.5  # 4 degrees: p = 0.001


def test_draws_of_one_seed_are_independent():
    """The pairs of successive draws follow the product of the distribution with itself."""
    params = SamplingParams(temperature=1.0)
    rows = [Draws(params, 11, count=n) for n in range(20_000)]
    tokens = torch.tensor([c.token for c in sample(LOGITS.expand(20_000, -1), rows)])
    p = LOGITS.softmax(-1)
    counts = torch.bincount(tokens[:-1] * 5 + tokens[1:], minlength=25).double()
    assert chi_square(counts, (p[:, None] * p).flatten()) < 51.2  # 24 degrees: p = 0.001


def test_noise_is_uniform_over_tokens_and_keys():
    u = uniform(torch.tensor([draw_key(0, 0, n) for n in range(200)]), torch.arange(1000))
    assert u.min() > 0 and u.max() < 1
    for v in (u.flatten(), u[:, 0], u[:, 999], u[0]):
        counts = torch.histc(v, bins=10, min=0, max=1)
        assert chi_square(counts, torch.full((10,), 0.1, dtype=torch.float64)) < 27.9  # 9 degrees: p = 0.001
    g = gumbel(torch.tensor([1, 2]), torch.arange(100_000))
    assert g.mean() == pytest.approx(0.5772, abs=0.01) and g.var() == pytest.approx(1.645, abs=0.03)


def test_a_seed_a_continuation_and_a_draw_each_make_another_key():
    keys = {draw_key(s, c, n) for s in range(5) for c in range(5) for n in range(5)}
    assert len(keys) == 125 and all(-(2**63) <= key < 2**63 for key in keys)


def test_penalties_and_bias_are_those_of_the_formulas():
    row = Draws(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((4, 9.0),), logprobs=5), 0)
    for token in (0, 0, 1):
        row.note(token)
    assert sample(LOGITS[None], [row])[0].token == 4
    row = Draws(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), 0)
    for token in (0, 0, 1):  # 3 - 0.5 - 2 * 0.25 = 2; 2 - 0.5 - 0.25 = 1.25
        row.note(token)
    assert sample(torch.tensor([[3.0, 2.0, 2.1]]), [row])[0].token == 2
    row = Draws(SamplingParams(repetition_penalty=2.0), 0, read={0, 4})
    row.note(2)
    seen = torch.tensor([[True, False, True, False, True]])
    assert sample(LOGITS[None], [row])[0].token == int(penalize(LOGITS[None], seen, 2.0).argmax())


def test_rows_do_not_see_each_other():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 30, generator=generator)
    kinds = [
        SamplingParams(), SamplingParams(temperature=0.8), SamplingParams(temperature=1.2, top_p=0.8, logprobs=3),
        SamplingParams(temperature=1.0, frequency_penalty=1.0, logit_bias=((3, 2.0),)),
    ]  # fmt: skip
    rows = [Draws(kinds[i % 4], i, i % 3, i) for i in range(40)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(40)]


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 5}, {"top_k": 2000}, {"top_p": 0.5}, {"top_p": 0.999}, {"min_p": 0.2}, {"min_p": 1e-6},
        {"top_k": 40, "top_p": 0.7, "min_p": 0.05}, {"top_p": 0.9, "min_p": 0.01}, {"top_k": 3000, "top_p": 0.8},
    ],
)  # fmt: skip
def test_looking_at_the_likeliest_first_keeps_what_the_filters_keep(filters, spread):
    """Large vocabulary, flat and peaked: the tokens kept, and their logits, are those of lm.generate's filters."""
    logits = spread * torch.randn(3, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = SamplingParams(temperature=0.8, **filters).filters
    expected = filter_logits(logits, settings)
    kept, names = kept_logits(logits, settings)
    found = torch.full_like(expected, -torch.inf).scatter(1, names.expand_as(kept), kept)
    assert torch.equal(found, expected)


@given(tokens=st.lists(st.integers(0, 9), max_size=6))
def test_what_a_choice_would_depend_on_is_what_it_depends_on_then(tokens):
    """`after` some tokens, and after each was noted; the draws themselves stay as they are."""
    first = Draws(SamplingParams(presence_penalty=0.5), 3, read={1})
    first.note(4)
    noted = replace(first, chosen=first.chosen.copy())
    for token in tokens:
        noted.note(token)
    assert first.after(tokens) == noted and first.after(tokens).key == noted.key
    assert first.count == 1 and first.chosen == {4: 1}
