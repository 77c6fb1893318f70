"""How much is guessed: everything where guesses are right, next to nothing where they are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba3.engine import Engine, EngineConfig, SamplingParams
from mamba3.engine.pace import LONGEST_PAUSE, RESTART, Pace
from tests.engine.cases import Arrival, model, play


def guesses(right, tokens, most):
    """Sizes of the guesses made for a text of so many tokens, right(place) being how many hold there."""
    pace, chosen, made = Pace(), 1, []
    while chosen < tokens:
        wanted, kept = pace.wanted(chosen, most), 0
        if wanted:
            kept = min(right(chosen), wanted)
            made.append(wanted)
        chosen += 1 + kept
        if wanted:
            pace.note(wanted, kept, chosen)
    return made


@given(most=st.integers(1, 16))
def test_what_is_always_right_is_always_guessed(most):
    assert set(guesses(lambda place: most, 300, most)) == {most}


@given(most=st.integers(1, 16))
def test_what_is_never_right_is_rarely_guessed(most):
    made = guesses(lambda place: 0, 3300, most)
    assert len(made) <= 6 + 3300 / LONGEST_PAUSE and made[0] == most and set(made[1:]) == {min(RESTART, most)}


@given(most=st.integers(2, 16), never=st.integers(0, 500))
def test_a_text_that_begins_to_repeat_itself_is_noticed(most, never):
    """No later than the longest pause: then 2, 4, ... tokens are guessed, and no pause lies between."""
    made = guesses(lambda place: 0 if place < never else most, never + LONGEST_PAUSE + 200, most)
    assert made[-1] == most and sum(made) >= 200 * most / (most + 1) - 3 * most - 8


@given(most=st.integers(1, 16), kept=st.lists(st.integers(0, 16), max_size=60))
def test_a_guess_is_never_longer_than_it_may_be(most, kept):
    pace, chosen = Pace(), 1
    for right in kept:
        wanted = pace.wanted(chosen, most)
        assert 0 <= wanted <= most
        chosen += 1 + min(right, wanted)
        if wanted:
            pace.note(wanted, min(right, wanted), chosen)
    assert pace.wanted(chosen + LONGEST_PAUSE, most) >= 1 and pace.wanted(chosen, 0) == 0


class ForOne:
    """Guesses, wrongly, for the sequences of one prompt alone."""

    def propose(self, sequence, count):
        return [0] * count if sequence.tokens[0] == 1 else []


@pytest.mark.parametrize(("others", "guessed"), [(0, True), (1, True), (2, False)])
def test_where_fewer_than_half_have_a_guess_nobody_guesses(others, guessed):
    engine = Engine(model(), EngineConfig(rows=4, speculate=2), draft=ForOne())
    play(engine, [Arrival(0, [1 + i], SamplingParams(max_tokens=6)) for i in range(1 + others)])
    assert bool(engine.counters.guessed_tokens) == guessed
