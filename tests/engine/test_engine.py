"""Laws of the engine: the plain loop's tokens, whatever arrives when; seeds; fairness; room; no state leaks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.engine import LLM, Engine, EngineConfig, QueueFull, Request, SamplingParams
from mamba3.engine.pages import Pages
from mamba3.engine.runner import Runner
from mamba3.engine.sequence import Sequence
from mamba3.engine.state_pool import StatePool
from mamba3.nn.cache import AttentionState, whole_pages
from mamba3.ops import State
from mamba3.text.encode import encode
from mamba3.train.tokenizer import byte_tokenizer, train_bpe
from tests.engine.cases import Arrival, arrivals, configs, greedy, model, play, prompts
from tests.lm.test_model import tiny

LENGTHS = st.integers(1, 7).map(lambda n: SamplingParams(max_tokens=n))
COPIES = st.builds(SamplingParams, max_tokens=st.integers(1, 7), n=st.integers(1, 3))


def check_greedy(lm, config, script, piece=2048):
    engine = Engine(lm, config)
    for (i, _), outcome in play(engine, script).items():
        arrival, reason = script[i], outcome.finish.reason
        expected = greedy(lm, arrival.prompt, arrival.params.max_tokens, piece)
        assert outcome.tokens == (expected if reason == "length" else expected[: len(outcome.tokens)])
        assert reason == "length" or (reason == "aborted" and arrival.leaves is not None)


@pytest.mark.parametrize("kind", ["siso", "mimo", "hybrid"])
@settings(max_examples=6)
@given(data=st.data())
def test_greedy_is_the_plain_loop_whatever_arrives_when(kind, data):
    """float64: two logits are never as close as the rounding by which batches and pieces of other sizes differ."""
    check_greedy(model(kind), data.draw(configs()), data.draw(arrivals(COPIES)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["siso", "mimo", "hybrid"])
@settings(max_examples=150)
@given(data=st.data())
def test_greedy_is_the_plain_loop_for_long(kind, data):
    check_greedy(model(kind), data.draw(configs()), data.draw(arrivals(COPIES, most=20)))


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
@settings(max_examples=4)
@given(data=st.data(), piece=st.sampled_from([3, 7]))
def test_exact_is_bitwise_the_plain_loop(kind, data, piece):
    """float32, to the last bit of every log probability: other sequences in the batch change nothing at all."""
    lm = model(kind, torch.float32)
    config = data.draw(configs(exact=True, prefill_chunk=piece, cache_grid=2 * piece))
    script = data.draw(arrivals(LENGTHS.map(lambda params: replace(params, logprobs=1))))
    check_greedy(lm, config, script, piece)
    for (i, _), outcome in play(Engine(lm, config), script).items():
        alone = plain_logprobs(lm, script[i].prompt, len(outcome.tokens), piece)
        assert [found.logprob for found in outcome.logprobs] == alone


def plain_logprobs(lm, prompt, count, piece):
    """Log probabilities of the plain loop's choices, from the calls that it makes."""
    state, found = lm.init_state(1), []
    with torch.no_grad():
        for part in torch.tensor([prompt]).split(piece, dim=1):
            logits, state = lm.prefill(part, state, last_only=True)
        logits = logits[:, -1]
        for _ in range(count):
            logprobs = logits[:, : lm.config.vocab_size].double().log_softmax(-1)
            found.append(float(logprobs.max()))
            logits, state = lm.step(logits[:, : lm.config.vocab_size].argmax(-1), state)
    return found


SEEDED = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 8), temperature=st.sampled_from([0.7, 1.5]), seed=st.integers(0, 3), n=st.integers(1, 2),
    top_p=st.sampled_from([1.0, 0.9]), top_k=st.sampled_from([0, 20]), frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.3]), repetition_penalty=st.sampled_from([1.0, 1.2]),
)  # fmt: skip


@settings(max_examples=5)
@given(config=configs(), script=arrivals(SEEDED))
def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(config, script):
    crowded = play(Engine(model(), config), script)
    for (i, index), outcome in crowded.items():
        alone = play(Engine(model(), EngineConfig(cache_bytes=0)), [Arrival(0, script[i].prompt, script[i].params)])
        assert outcome.tokens == alone[0, index].tokens[: len(outcome.tokens)]
        assert outcome.finish.reason == "aborted" or len(outcome.tokens) == script[i].params.max_tokens


def test_continuations_of_one_prompt_differ_and_the_prompt_is_read_once():
    engine = Engine(model(), EngineConfig(rows=2, cache_bytes=0))
    prompt = list(range(30))
    found = play(engine, [Arrival(0, prompt, SamplingParams(max_tokens=6, temperature=1.5, seed=4, n=5))])
    assert len({tuple(outcome.tokens) for outcome in found.values()}) == 5
    assert engine.counters.prompt_tokens == 30 and engine.counters.chosen_tokens == 30


# -- no state of one reaches another


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
@settings(max_examples=5)
@given(data=st.data())
def test_what_a_freed_row_held_reaches_nobody(kind, data):
    """Freed rows are filled with NaN: were an element of one read before it is written, tokens or states would show it."""
    free, release, script = StatePool._zero, Pages._release, data.draw(arrivals(LENGTHS))

    def poison(self, row):
        free(self, row)
        for layer in self._state.layers:
            for v in layer:
                if isinstance(v, torch.Tensor) and v.is_floating_point():
                    v[row] = math.nan

    def poison_page(self, page):
        release(self, page)
        self.kv[:, :, page] = math.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatePool, "_zero", poison)
        patch.setattr(Pages, "_release", poison_page)
        check_greedy(model(kind), data.draw(configs()), script)


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
def test_freed_rows_are_zeros(kind):
    engine = Engine(model(kind), EngineConfig(rows=3))
    play(engine, [Arrival(i, [1, 2, 3 + i], SamplingParams(max_tokens=3 + i)) for i in range(5)])
    pool = engine.pool
    states = [layer for layer in pool.view(3).layers if isinstance(layer, State)]
    assert states and not any(bool(v.any()) for state in states for v in state.tensors().values())
    assert not pool.view(3).tokens.any() and not pool._table.any()


def test_the_last_used_row_moves_into_a_freed_one():
    lm = model("hybrid")
    states = [lm.prefill(torch.tensor([range(1 + n, 6 + 2 * n)]))[1] for n in range(3)]
    pool = StatePool(lm, 3, 100, Pages(lm, 9))
    assert [pool.add(state) for state in states] == [0, 1, 2]
    assert pool.free(0) == 2 and pool.used == 2
    for row, state in enumerate((states[2], states[1])):
        back = pool.read(row)
        for mine, theirs in zip(back.layers, state.layers, strict=True):
            for a, b in zip(mine.tensors().values(), theirs.tensors().values(), strict=True):
                assert torch.equal(a[:, : b.shape[1]] if b.ndim > 1 else a, b)
        assert torch.equal(back.tokens, state.tokens)
    assert pool.free(1) is None and pool.used == 1


# -- turns


def test_owners_take_turns():
    engine = Engine(model(), EngineConfig(rows=1))
    script = [Arrival(0, [i + 1], SamplingParams(max_tokens=2), "many") for i in range(6)]
    script.append(Arrival(0, [9], SamplingParams(max_tokens=2), "one"))
    order = list(play(engine, script))
    assert order.index((6, 0)) == 1


def test_a_long_prompt_does_not_hold_up_a_short_one():
    engine = Engine(model(), EngineConfig(rows=4, prefill_chunk=8, step_tokens=16))
    script = [Arrival(0, [1] * 400, SamplingParams(max_tokens=2)), Arrival(1, [2] * 9, SamplingParams(max_tokens=2))]
    assert next(iter(play(engine, script))) == (1, 0)


def test_prompts_do_not_stop_those_that_run():
    """Between two tokens of a running sequence at most step_tokens are read."""
    engine = Engine(model(), EngineConfig(rows=4, prefill_chunk=64, step_tokens=20))
    engine.add(Request(id="run", tokens=[1], params=SamplingParams(max_tokens=30)))
    engine.step()
    engine.add(Request(id="long", tokens=[2] * 300, params=SamplingParams(max_tokens=1)))
    while "long" in engine:
        before = engine.counters.prompt_tokens
        assert [o.request_id for o in engine.step()][:1] == ["run"]
        assert engine.counters.prompt_tokens - before <= 19


def test_a_sequence_that_used_its_quantum_makes_way():
    engine = Engine(model(), EngineConfig(rows=1, quantum=3))
    script = [Arrival(0, [1, 2], SamplingParams(max_tokens=40)), Arrival(1, [3], SamplingParams(max_tokens=2))]
    assert list(play(engine, script)) == [(0, 0), (1, 0)] and engine.counters.preemptions >= 1
    assert play(engine, script)[0, 0].tokens == greedy(model(), [1, 2], 40)


def test_the_queue_is_bounded():
    engine = Engine(model(), EngineConfig(rows=1, queue=2))
    for i in range(2):
        engine.add(Request(id=str(i), tokens=[1]))
    with pytest.raises(QueueFull, match="2 requests of yours wait"):
        engine.add(Request(id="2", tokens=[1]))
    assert "2" not in engine and not engine.has_room()


def test_nobody_can_fill_the_queue_of_another():
    """Each owner waits in a queue of its own, however many continuations the others ask for."""
    engine = Engine(model(), EngineConfig(rows=1, queue=4))
    engine.add(Request(id="many", tokens=[1], params=SamplingParams(max_tokens=9, n=30), owner="many"))
    engine.step()
    assert engine.scheduler.waiting == 29 and not engine.has_room("many") and engine.has_room("one")
    with pytest.raises(QueueFull, match="29 requests of yours wait"):
        engine.add(Request(id="more", tokens=[1], owner="many"))
    engine.add(Request(id="one", tokens=[2], params=SamplingParams(max_tokens=2), owner="one"))
    ended = []
    while engine.busy:
        ended += [output.request_id for output in engine.step() if output.finish is not None]
    assert ended.index("one") == 2 and engine.scheduler.waiting == 0  # after the one that ran and the one that was next


def test_users_of_one_owner_take_turns_within_its_turn():
    """An owner with many users is served no more often than one with none."""
    engine = Engine(model(), EngineConfig(rows=1, queue=20))
    for i in range(6):
        params = SamplingParams(max_tokens=2)
        engine.add(Request(id=f"user{i % 3} {i}", tokens=[i + 1], params=params, owner="many", user=f"u{i % 3}"))
        engine.add(Request(id=f"one {i}", tokens=[i + 1], params=params, owner="one"))
    order = []
    while engine.busy:
        order += [output.request_id.split()[0] for output in engine.step() if output.finish is not None]
    assert order[1::2] == ["one"] * 6 and order[::2] == ["user0", "user1", "user2"] * 2


def test_an_aborted_request_frees_its_row_at_once():
    engine = Engine(model(), EngineConfig(rows=1))
    engine.add(Request(id="a", tokens=[1], params=SamplingParams(max_tokens=1000)))
    engine.step()
    (output,) = engine.abort("a")
    assert output.finish.reason == "aborted" and engine.pool.used == 0 and not engine.busy and "a" not in engine
    assert engine.abort("a") == []


# -- the prefix cache


def test_repeating_a_prompt_reads_nothing():
    engine = Engine(model(), EngineConfig())
    script = [Arrival(0, list(range(20)), SamplingParams(max_tokens=4))]
    first = play(engine, script)[0, 0]
    read = engine.counters.prompt_tokens
    second = play(engine, script)[0, 0]
    assert (first.cached, second.cached) == (0, 20) and engine.counters.prompt_tokens == read
    assert first.tokens == second.tokens


def test_the_next_turn_begins_where_the_last_one_ended():
    engine = Engine(model(), EngineConfig())
    prompt = list(range(20))
    reply = play(engine, [Arrival(0, prompt, SamplingParams(max_tokens=6))])[0, 0].tokens
    following = prompt + reply + [1, 2]
    found = play(engine, [Arrival(0, following, SamplingParams(max_tokens=6))])[0, 0]
    assert found.cached == 25 and found.tokens == greedy(model(), following, 6)  # all but the token chosen last


def test_where_two_prompts_branch_the_third_begins():
    engine, stem = Engine(model(), EngineConfig()), list(range(30))
    cached = [
        play(engine, [Arrival(0, stem + [tail] * 5, SamplingParams(max_tokens=2))])[0, 0].cached for tail in (1, 2, 3)
    ]
    assert cached == [0, 0, 30]


def test_the_cache_of_one_owner_is_closed_to_the_others():
    engine = Engine(model(), EngineConfig())
    script = [Arrival(at, list(range(20)), SamplingParams(max_tokens=2), owner) for at, owner in ((0, "a"), (9, "b"))]
    assert [outcome.cached for outcome in play(engine, script).values()] == [0, 0]


# -- text


@pytest.fixture(scope="module")
def texts():
    """A byte model and one of byte-level BPE whose tokens end within characters and within stop strings."""
    corpus = ["naïve café — 東京 🦙 the end.", "日本語 🎉 é è ü the end of the text"] * 20
    return [
        (tiny(vocab_size=tokenizer.get_vocab_size()), tokenizer)
        for tokenizer in (byte_tokenizer(), train_bpe(corpus, 300))
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_the_text_is_that_of_the_tokens_and_never_half_a_character(texts, which):
    lm, tokenizer = texts[which]
    engine = Engine(lm, EngineConfig(), tokenizer)
    wanted = "x東京 🦙 naïve 🎉"
    ids = encode(tokenizer, [wanted])[0].tolist()
    for token in ids[1:]:  # the model is made to say it
        engine.add(Request(id="a", tokens=ids[:1], params=SamplingParams(max_tokens=1, logit_bias=((token, 1e9),))))
        engine.step()
    said = engine._texts.start(ids[:1], ())
    pieces = [said.push(token) for token in ids[1:]] + [said.finish()]
    assert "".join(pieces) == wanted[1:] and "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("stop", ["en", "the end", " 🦙", "d. ", "never said"])
def test_a_stop_string_ends_the_text_before_it(texts, stop):
    lm, tokenizer = texts[0]
    said = "it was the end. 🦙 and so on"
    ids = encode(tokenizer, [said])[0].tolist()
    lm = scripted(lm, [ord("x"), *ids])
    engine = Engine(lm, EngineConfig(), tokenizer)
    params = SamplingParams(max_tokens=len(ids), stop=(stop, "zzz"))
    engine.add(Request(id="a", tokens=[ord("x")], params=params))
    outputs = []
    while engine.busy:
        outputs += engine.step()
    text = "".join(output.text for output in outputs)
    assert text == said.split(stop)[0] and outputs[-1].finish.reason == ("stop" if stop in said else "length")
    shown = 0
    for output in outputs:  # nothing of the stop string is shown on the way
        shown += len(output.text)
        assert said.startswith(text[:shown])


def scripted(lm, ids):
    """The model, made to say ids[1:] after ids[0]: its logits are replaced by position."""

    class Scripted(type(lm)):
        def _say(self, position):
            logits = torch.zeros(len(position), self.config.padded_vocab_size)
            for row, p in enumerate(position.tolist()):
                logits[row, ids[min(p, len(ids) - 1)]] = 1.0
            return logits

        def prefill(self, *args, **kwargs):
            _, state = super().prefill(*args, **kwargs)
            return self._say(state.tokens).unsqueeze(1), state

        def step(self, *args):
            _, state = super().step(*args)
            return self._say(state.tokens), state

    lm.__class__ = Scripted
    return lm


# -- ends, log probabilities, errors


def test_the_end_token_ends_and_is_not_text(texts):
    lm, tokenizer = texts[0]
    params = SamplingParams(max_tokens=9, logit_bias=((256, 1e9),))
    for ignore, reason, count in ((False, "stop", 1), (True, "length", 9)):
        engine = Engine(lm, EngineConfig(), tokenizer, end_token=256)
        ((_, outcome),) = play(engine, [Arrival(0, [65], replace(params, ignore_end=ignore))]).items()
        assert (outcome.finish.reason, len(outcome.tokens), outcome.text) == (reason, count, "")


def test_log_probabilities_are_those_of_the_forward_pass():
    lm, prompt = model("hybrid"), [3, 1, 4, 1, 5, 9, 2, 6]
    params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1, temperature=1.0, seed=0)
    (result,) = LLM(lm, config=EngineConfig(prefill_chunk=3)).generate([prompt], params)
    whole = prompt + result.completions[0].tokens
    expected = lm(torch.tensor([whole]))[0, :, :50].detach().log_softmax(-1)
    given = [*result.prompt_logprobs[1:], *result.completions[0].logprobs]
    assert result.prompt_logprobs[0] is None and len(given) == len(whole) - 1
    for position, found in enumerate(given):
        assert found.token == whole[position + 1]
        assert found.logprob == pytest.approx(float(expected[position, found.token]), abs=1e-9)
        values, tokens = expected[position].topk(len(found.top))
        assert [t for t, _ in found.top] == tokens.tolist()
        assert [v for _, v in found.top] == pytest.approx(values.tolist(), abs=1e-9)
    assert [len(f.top) for f in given] == [1] * 7 + [2] * 3


def test_a_prompt_may_only_be_read():
    llm = LLM(model(), config=EngineConfig(prefill_chunk=3))
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    for _ in range(2):
        (result,) = llm.generate([[1, 2, 3, 4]], params)
        (several,) = llm.generate([[1, 2, 3, 4]], replace(params, n=3))
        assert result.completions[0].tokens == [] and len(result.prompt_logprobs) == len(several.prompt_logprobs) == 4
        assert result.completions[0].finish_reason == "length"


def test_the_state_of_a_prompt_that_is_only_read_comes_back():
    for kind in ("siso", "hybrid"):
        lm = model(kind)
        found = play(Engine(lm), [Arrival(0, [1, 2, 3], SamplingParams(max_tokens=0), keeps=True)])[0, 0].finish
        state = found.state
        assert (int(state.tokens), found.tokens) == (3, 0)
        again = lm.generate(torch.tensor([[4]]), state=state, max_new_tokens=5).tokens[0].tolist()
        assert again == greedy(lm, [1, 2, 3, 4], 5)


def test_a_cache_is_no_longer_than_its_sequence_whoever_it_was_read_with():
    runner, counts = Runner(model("hybrid"), exact=False), [70, 3]
    pieces = [
        (Sequence(Request(id=str(i), tokens=[1]), 0, np.ones(3 * count, dtype=np.int64), None), count)
        for i, count in enumerate(counts)
    ]
    for turn in (1, 2, 3):
        runner.read(pieces)
        for sequence, count in pieces:
            for cache in (layer for layer in sequence.state.layers if isinstance(layer, AttentionState)):
                assert cache.used == int(cache.length) == turn * count
                assert cache.k.shape[1] <= whole_pages(cache.used)


def test_a_hybrid_ends_at_max_length():
    lm = model("hybrid")
    (result,) = LLM(lm, config=EngineConfig(max_length=12)).generate([[1] * 8], SamplingParams(max_tokens=100))
    assert result.completions[0].tokens == greedy(lm, [1] * 8, 5)  # the last one is not read
    with pytest.raises(ValueError, match="The prompt has 13 tokens, and a sequence at most 12"):
        LLM(lm, config=EngineConfig(max_length=12)).generate([[1] * 13])
    (result,) = LLM(model(), config=EngineConfig(max_length=12)).generate([[1] * 20], SamplingParams(max_tokens=9))
    assert len(result.completions[0].tokens) == 9  # a state of fixed size has no such end


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(id="a", tokens=[]), "at least one token"),
        (Request(id="a", tokens=[50]), r"Tokens must lie in \[0, 50\); they go from 50 to 50"),
        (Request(id="a", tokens=[1], params=SamplingParams(stop=("x",))), "Stop strings need text"),
        (
            Request(id="a", tokens=[1], params=SamplingParams(logit_bias=((99, 1.0),))),
            "logit_bias names tokens outside",
        ),
    ],
)
def test_requests_that_cannot_be_served(request_, message):
    with pytest.raises(ValueError, match=message):
        Engine(model()).add(request_)


def test_a_state_of_other_weights_is_refused():
    start = tiny(seed=5).init_state(1)
    with pytest.raises(ValueError, match="made by other weights"):
        Engine(model()).add(Request(id="a", tokens=[1], start=start))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n must be >= 1; it is 0"),
        ({"presence_penalty": 3}, r"presence_penalty must lie in \[-2, 2\]"),
        ({"logprobs": 21}, "logprobs must lie in"),
        ({"stop": ("",)}, "stop must hold no empty text"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"max_tokens": -1}, "max_tokens must be >= 0"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_configurations_out_of_range():
    with pytest.raises(ValueError, match="rows must be at least 1; it is 0"):
        EngineConfig(rows=0)
    with pytest.raises(ValueError, match="cache_grid must be a multiple of prefill_chunk = 512"):
        EngineConfig(exact=True, cache_grid=100)


@settings(max_examples=5)
@given(script=st.lists(prompts(), min_size=1, max_size=5))
def test_llm_results_come_in_the_order_of_the_prompts(script):
    results = LLM(model(), config=EngineConfig(rows=2, queue=1)).generate(script, SamplingParams(max_tokens=3))
    assert [r.prompt for r in results] == script
    assert [r.completions[0].tokens for r in results] == [greedy(model(), p, 3) for p in script]


def test_llm_reads_text(texts):
    lm, tokenizer = texts[0]
    (result,) = LLM(lm, tokenizer).generate(["héllo"], SamplingParams(max_tokens=5, temperature=1.0, seed=1))
    assert result.prompt == list("héllo".encode())
    assert result.completions[0].text == bytes(t for t in result.completions[0].tokens if t < 256).decode(
        errors="replace"
    )
    with pytest.raises(ValueError, match="needs a tokenizer"):
        LLM(lm).generate(["text"])
