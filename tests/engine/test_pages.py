"""Laws of the paged caches: the plain loop's tokens however few pages there are, nothing leaks, what is full is shared."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.engine import LLM, Engine, EngineConfig, Request, SamplingParams
from mamba3.engine.pages import OutOfPages, Pages, StoredState, page_bytes
from mamba3.engine.rows import Rows
from mamba3.engine.sequence import Stage
from mamba3.engine.state_pool import StatePool
from mamba3.nn.cache import PAGE
from mamba3.train.tokenizer import byte_tokenizer
from tests.engine.cases import Arrival, arrivals, configs, greedy, model, play
from tests.engine.test_engine import check_greedy
from tests.lm.test_model import tiny

LM = model("hybrid")
LONG = st.builds(SamplingParams, max_tokens=st.integers(1, 40), n=st.integers(1, 2))


def long_prompts():
    """Prompts of up to four pages that often begin alike."""
    stem = [7, 3, 7, 7, 1, 3, 9, 4] * 30
    cut = st.tuples(st.integers(0, 220), st.lists(st.sampled_from([1, 3, 7, 9]), min_size=1, max_size=3))
    return cut.map(lambda pair: stem[: pair[0]] + pair[1])


def few_pages(count: int) -> int:
    return (count + 1) * page_bytes(LM)


@st.composite
def cramped(draw, **fixed):
    """Engines with so few pages that sequences make way for each other: the longest one alone takes five, and a copy."""
    speculate = draw(st.sampled_from([0, 0, 3]))
    config = draw(
        configs(prefill_chunk=64, step_tokens=130, cache_grid=64, max_length=300, speculate=speculate, **fixed)
    )
    return EngineConfig(**{**vars(config), "attention_bytes": few_pages(draw(st.integers(6, 12)))})


def taken(engine: Engine) -> int:
    """Pages that somebody holds."""
    assert engine.pool.pages is not None
    return engine.pool.pages.count - engine.pool.pages.free


def free_of_all(engine: Engine) -> bool:
    engine.cache.clear()
    return taken(engine) == 0


def long_scripts(most: int):
    """Scripts of requests with prompts of up to four pages."""
    return arrivals(LONG, most=most).flatmap(
        lambda script: st.lists(long_prompts(), min_size=len(script), max_size=len(script)).map(
            lambda prompts: [replace(arrival, prompt=p) for arrival, p in zip(script, prompts, strict=True)]
        )
    )


@settings(max_examples=12)
@given(config=cramped(), script=long_scripts(5))
def test_greedy_is_the_plain_loop_however_few_pages_there_are(config, script):
    """A page that comes free is filled with NaN: tokens would show that one was read."""
    release = Pages._release

    def poison(self, page):
        release(self, page)
        self.kv[:, :, page] = math.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pages, "_release", poison)
        check_greedy(LM, config, script)


def test_sequences_that_make_way_go_on_as_if_nothing_had_been():
    engine = Engine(LM, EngineConfig(rows=4, attention_bytes=few_pages(7), cache_bytes=0, max_length=300))
    script = [Arrival(0, [1 + i] * 50, SamplingParams(max_tokens=150)) for i in range(4)]
    for (i, _), outcome in play(engine, script).items():
        assert outcome.tokens == greedy(LM, [1 + i] * 50, 150)
    assert engine.counters.swaps > 0 and free_of_all(engine)


@pytest.mark.parametrize("most", [200, 120])
def test_one_that_makes_way_in_the_middle_of_a_step_is_written_down_all_the_same(monkeypatch, most):
    """Its token was read and is chosen after it lost its row: a stop string may begin there, and it may be the last one."""
    made_way = []

    def swap_out(self, sequence):
        made_way.append((sequence.request.id, sequence.stage, len(sequence.chosen)))
        swap(self, sequence)

    swap = Rows.swap_out
    monkeypatch.setattr(Rows, "swap_out", swap_out)
    lm = tiny("hybrid", vocab_size=257, dtype=torch.float64).eval()
    sizes = {"prefill_chunk": 2, "step_tokens": 4, "cache_bytes": 0, "max_length": 300}
    engine = Engine(lm, EngineConfig(attention_bytes=8 * page_bytes(lm), **sizes), byte_tokenizer())
    params = SamplingParams(max_tokens=most, logit_bias=((ord("a"), 1000.0),), stop=("ab",))
    engine.add(Request(id="old", tokens=[98] * 250, params=SamplingParams(max_tokens=2)))
    engine.add(Request(id="young", tokens=[99] * 10, params=params, keep_state=True))
    outputs = []
    while engine.busy:
        outputs += [output for output in engine.step() if output.request_id == "young"]
    assert made_way == [("young", Stage.RUNNING, 119)]
    assert "".join(output.text for output in outputs) == "a" * most
    finish, read = outputs[-1].finish, [99] * 10 + [ord("a")] * (most - 1)
    assert finish.state.tokens.item() == len(read) and finish.tokens == most - 1
    _, expected = lm.prefill(torch.tensor([read]))
    assert torch.allclose(finish.state.layers[0].S, expected.layers[0].S, atol=1e-9)


def test_pages_are_taken_as_sequences_grow_and_come_back():
    engine = Engine(LM, EngineConfig(rows=2, cache_bytes=0, max_length=300))
    engine.add(Request(id="a", tokens=[1] * 60, params=SamplingParams(max_tokens=72)))
    counts = []
    while engine.busy:
        engine.step()
        counts.append(taken(engine))
    assert counts[0] == 1 and counts[10] == 2 and counts[-2] == 3 and counts[-1] == 0


def test_a_fork_shares_full_pages_and_copies_the_last():
    engine = Engine(LM, EngineConfig(rows=3, cache_bytes=0, max_length=600))
    engine.add(Request(id="a", tokens=[1] * (4 * PAGE + 9), params=SamplingParams(max_tokens=5, n=3, temperature=1.0)))
    engine.step()
    engine.step()
    assert len(engine.scheduler.running) == 3 and taken(engine) == 4 + 3
    assert [engine.pool._pages[row][:4] for row in (1, 2)] == [engine.pool._pages[0][:4]] * 2


def test_snapshots_share_pages_and_give_way_to_sequences():
    engine = Engine(
        LM, EngineConfig(rows=2, attention_bytes=few_pages(8), cache_grid=64, prefill_chunk=64, max_length=400)
    )
    play(engine, [Arrival(0, [1] * 320, SamplingParams(max_tokens=2))])
    pages = engine.pool.pages
    assert (
        len(engine.cache) == 6 and pages.count - pages.free == 6
    )  # five pages and the turn's end, not 1 + 2 + 3 + ...
    found = play(engine, [Arrival(0, [1] * 322, SamplingParams(max_tokens=2))])[0, 0]
    assert found.cached == 320 and found.tokens == greedy(LM, [1] * 322, 2)
    assert play(engine, [Arrival(0, [2] * 400, SamplingParams(max_tokens=1))])[0, 0].tokens == greedy(LM, [2] * 400, 1)
    assert free_of_all(engine)


def test_a_sequence_longer_than_all_pages_is_refused_or_ends():
    config = EngineConfig(rows=1, attention_bytes=few_pages(3), max_length=10_000)
    (result,) = LLM(LM, config=config).generate([[1] * 100], SamplingParams(max_tokens=1000))
    assert result.completions[0].tokens == greedy(LM, [1] * 100, 29)  # two pages; the last token is not read
    with pytest.raises(ValueError, match="The prompt has 129 tokens, and a sequence at most 128"):
        LLM(LM, config=config).generate([[1] * 129])
    with pytest.raises(ValueError, match="attention_bytes must hold at least 3 pages of 8,192 bytes"):
        Engine(LM, EngineConfig(attention_bytes=few_pages(1)))


def test_a_state_comes_back_from_pages_as_it_was():
    pages = Pages(LM, 9)
    with torch.no_grad():
        _, before = LM.prefill(torch.randint(0, 50, (1, 100)))
        first = pages.store(before)
        _, after = LM.prefill(torch.randint(0, 50, (1, 50)), pages.fetch(first))
        second = pages.store(after, first)
    assert isinstance(second, StoredState) and second.held.pages[0] == first.held.pages[0] and pages.free == 8 - 2 - 2
    for stored, state in ((first, before), (second, after)):
        back = pages.fetch(stored.clone())
        for mine, theirs in zip(back.layers, state.layers, strict=True):
            for a, b in zip(mine.tensors().values(), theirs.tensors().values(), strict=True):
                assert torch.equal(a, b)
    with pytest.raises(OutOfPages, match="5 pages are wanted, and 4 of 8 are free"):
        pages.take(5)
    with pytest.raises(ValueError, match="The state has 2 layers but the model 3"):
        LM.prefill(torch.tensor([[1]]), first)
    del first, stored
    assert pages.free == 8 - 3
    del second
    assert pages.free == 8


def test_the_pool_says_what_it_lacks():
    pages = Pages(LM, 4)
    pool = StatePool(LM, 2, 200, pages)
    with torch.no_grad():
        pool.add(LM.prefill(torch.ones(1, 60, dtype=torch.int64))[1])
    assert [pool.wants(0, room) for room in (4, 5, 69)] == [0, 1, 2]
    pool.extend(0, 69)
    assert pages.free == 0 and pool.wants(0, 100) == 0
    with pytest.raises(OutOfPages):
        pool.extend(0, 140)


def test_a_reset_gives_out_all_pages_anew():
    """States of before, which somebody still has, take nothing from those of after."""
    engine = Engine(LM, EngineConfig(rows=2, max_length=300))
    engine.add(Request(id="a", tokens=[1] * 200, params=SamplingParams(max_tokens=70)))
    for _ in range(3):
        engine.step()
    kept = engine.pool.share(0)
    engine.reset()
    assert taken(engine) == 0 and not engine.busy
    script = [Arrival(0, [2] * 100, SamplingParams(max_tokens=9))]
    first = play(engine, script)[0, 0].tokens
    del kept
    assert first == play(engine, script)[0, 0].tokens == greedy(LM, [2] * 100, 9)
    assert free_of_all(engine)
