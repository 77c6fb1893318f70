"""Laws of a step that is launched before the one in front of it is given out: nothing comes out that would not have without.

Graphs are functions here, and what they leave is there at once: held is which step reads what, whose its result is, and what
is launched before what.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba3.engine import Engine, EngineConfig, Request, SamplingParams
from mamba3.engine import flight as flight_module
from mamba3.engine.channel import Channel
from mamba3.engine.pages import Pages
from mamba3.engine.runner import Runner
from mamba3.engine.sampler import likeliest
from mamba3.engine.state_pool import StatePool
from mamba3.engine.text import ContinuationText
from mamba3.train.tokenizer import byte_tokenizer
from tests.engine.cases import Arrival, arrivals, configs, greedy, model, play
from tests.engine.test_engine import check_greedy
from tests.engine.test_pages import cramped, long_scripts
from tests.lm.test_model import tiny
from tests.ops.cases import distance

SHARED = [HealthCheck.function_scoped_fixture]  # the imitation is the same for all examples
TOKENIZER = byte_tokenizer()


# -- what the device chooses


@given(
    rows=st.integers(1, 5), vocabulary=st.sampled_from([1, 63, 64, 65, 130, 200]), levels=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_likeliest_token_is_the_first_of_equal_ones(rows, vocabulary, levels, dtype, seed):
    """Padding behind the vocabulary is never chosen; NaN is what argmax says it is."""
    torch.manual_seed(seed)
    logits = torch.randint(-levels, levels + 1, (rows, vocabulary + 7)).to(dtype)
    logits[:, vocabulary:] = 1e9
    logits[0, seed % vocabulary] = math.nan if seed % 3 == 0 else levels
    assert torch.equal(likeliest(logits[:, :vocabulary]), logits[:, :vocabulary].argmax(-1))


@pytest.fixture
def coarse():
    """A model whose likeliest tokens are many, all equally likely."""
    lm = tiny(vocab_size=70)

    class Coarse(type(lm)):
        def step(self, *args):
            logits, state = super().step(*args)
            return (logits / logits.std()).round(), state

    lm.__class__ = Coarse
    return lm


def test_the_device_chooses_what_sample_would(imitation, coarse):
    script = [Arrival(i, [1 + i, 2], SamplingParams(max_tokens=40)) for i in range(5)]
    with_flights = play(Engine(coarse, EngineConfig(rows=3)), script)
    assert with_flights == play(Engine(coarse, EngineConfig(rows=3, graphs=False)), script)
    assert len({token for outcome in with_flights.values() for token in outcome.tokens}) > 5


@pytest.mark.parametrize(
    ("params", "there"),
    [
        (SamplingParams(), True),
        (SamplingParams(temperature=0.8, seed=1), True),
        (SamplingParams(top_p=0.5), True),  # of greedy choice, filters say nothing
        (SamplingParams(temperature=0.8, top_k=9, seed=1), False),
        (SamplingParams(temperature=0.8, top_p=0.9, seed=1), False),
        (SamplingParams(temperature=0.8, min_p=0.1, seed=1), False),
        (SamplingParams(logprobs=0), False),
        (SamplingParams(frequency_penalty=0.5), False),
        (SamplingParams(presence_penalty=0.5), False),
        (SamplingParams(repetition_penalty=1.1), False),
        (SamplingParams(logit_bias=((3, 1.0),)), False),
    ],
)
def test_what_needs_more_than_logits_and_noise_is_chosen_by_sample(imitation, monkeypatch, params, there):
    calls = []
    sample = flight_module.sample
    monkeypatch.setattr(flight_module, "sample", lambda *args: calls.append(1) or sample(*args))
    script = [Arrival(0, [1 + i], replace(params, max_tokens=9)) for i in range(2)]
    found = play(Engine(model(), EngineConfig()), script)
    assert len(calls) == (0 if there else 8)
    assert found == play(Engine(model(), EngineConfig(graphs=False)), script)


def test_two_temperatures_are_chosen_by_sample(imitation, monkeypatch):
    script = [Arrival(0, [1], SamplingParams(max_tokens=9, temperature=t, seed=5)) for t in (0.0, 0.7, 1.0)]
    found = play(Engine(model(), EngineConfig()), script)
    assert found == play(Engine(model(), EngineConfig(graphs=False)), script)


def test_nothing_is_sent_while_nothing_changes(imitation, monkeypatch):
    """The next step's tokens lie where the last one left them, until a sequence comes or goes."""
    sent, send = [], Channel.send
    monkeypatch.setattr(
        Channel, "send", lambda self, numbers, target: sent.append(numbers) or send(self, numbers, target)
    )
    engine = Engine(model(), EngineConfig(rows=2))
    list(engine.capture())
    sent.clear()
    first = greedy(model(), [1, 2], 9)
    assert play(engine, [Arrival(0, [1, 2], SamplingParams(max_tokens=9))])[0, 0].tokens == first
    assert sent == [[1, first[0]]]
    engine.add(Request(id="a", tokens=[1, 2], params=SamplingParams(max_tokens=9)))
    engine.step()
    engine.step()
    engine.add(Request(id="b", tokens=[3, 4], params=SamplingParams(max_tokens=9)))
    engine.step()
    assert sent[1:] == [[1, first[0]], [2, first[2], greedy(model(), [3, 4], 1)[0]]]


# -- the same as without


@pytest.fixture(scope="module")
def speakers():
    """Models that say a few characters over and over, so that stop strings are said."""
    found = {}
    for kind in ("siso", "hybrid"):
        lm = found[kind] = tiny(kind, vocab_size=TOKENIZER.get_vocab_size(), dtype=torch.float64).eval()
        with torch.no_grad():
            lm.embedding.weight[list("abé".encode())] *= 30
    return found


EVERYTHING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12), n=st.integers(1, 2), temperature=st.sampled_from([0.0, 0.0, 0.6]), seed=st.integers(0, 3),
    stop=st.sampled_from([(), (), ("aaaa",), ("bbb", "\x07\x07", "ax")]), stop_tokens=st.sampled_from([(), (98,)]),
    logprobs=st.sampled_from([None, None, 1]), top_k=st.sampled_from([0, 20]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
)  # fmt: skip


def agree(some, others):
    """Tokens, texts, log probabilities, reasons and states of each sequence; of one that left, what both have heard."""
    for key in some.keys() & others.keys():
        mine, theirs = some[key], others[key]
        if "aborted" in (mine.finish.reason, theirs.finish.reason):
            short, long = sorted((mine.tokens, theirs.tokens), key=len)
            assert long[: len(short)] == short
            continue
        assert (mine.tokens, mine.text) == (theirs.tokens, theirs.text)
        assert [p.logprob for p in mine.logprobs] == pytest.approx([p.logprob for p in theirs.logprobs], abs=1e-9)
        assert replace(mine.finish, state=None) == replace(theirs.finish, state=None)
        states = (mine.finish.state, theirs.finish.state)
        assert (states[0] is None) == (states[1] is None)
        if states[0] is not None:
            for a, b in zip(*(state.tensors().values() for state in states), strict=True):
                assert a.shape == b.shape and distance(a, b) < 1e-10


def keeping(script):
    return [replace(arrival, keeps=i % 2 == 0) for i, arrival in enumerate(script)]


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
@settings(max_examples=8, suppress_health_check=SHARED)
@given(config=configs(), script=arrivals(EVERYTHING).map(keeping))
def test_everything_that_comes_out_is_what_came_out_without(kind, imitation, speakers, config, script):
    lm = speakers[kind]
    ahead, behind = (play(Engine(lm, replace(config, graphs=graphs), TOKENIZER), script) for graphs in (True, False))
    agree(ahead, behind)
    left = {i for i, arrival in enumerate(script) if arrival.leaves is not None}
    assert all(i in left for i, _ in ahead.keys() ^ behind.keys())


@settings(max_examples=6, suppress_health_check=SHARED)
@given(config=cramped(), script=long_scripts(4))
def test_with_few_pages_too_and_whatever_comes_free_is_nobody_s(imitation, config, script):
    """Rows and pages that come free while a step is under way are NaN."""
    zero, release = StatePool._zero, Pages._release

    def poison_row(self, row):
        zero(self, row)
        for layer in self._fixed():
            layer.map(lambda v: v[row].fill_(math.nan))

    def poison_page(self, page):
        release(self, page)
        self.kv[:, :, page] = math.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatePool, "_zero", poison_row)
        patch.setattr(Pages, "_release", poison_page)
        check_greedy(model("hybrid"), config, script)


@pytest.mark.parametrize("graphs", [True, False])
def test_sequences_that_lose_their_row_in_flight_end_as_they_would(imitation, speakers, graphs):
    """One is swapped out in every step, after it was launched: stop strings are found, and states come back, all the same."""
    lm, config = speakers["hybrid"], EngineConfig(rows=2, cache_bytes=0, graphs=graphs)
    stops = [("bbbb",), ("aaaaa", "zz"), (), ("ax",), ("aab", "\ufffd" * 3)]
    script = [
        Arrival(
            i, [97, 98 + i] * 9, SamplingParams(max_tokens=12, temperature=0.6 * (i % 2), seed=i, stop=stop), keeps=True
        )
        for i, stop in enumerate(stops)
    ]
    engine = Engine(lm, config, TOKENIZER)
    paging, readable = engine._rows.paging, engine._rows.paging.readable

    def after_launching(pieces):
        if engine._flight is not None:
            engine._rows.swap_out(engine._flight._sequences[engine.counters.steps % len(engine._flight._sequences)])
        return readable(pieces)

    paging.readable = after_launching
    found = play(engine, script)
    assert engine.counters.swaps > 20
    agree(found, play(Engine(lm, config, TOKENIZER), script))
    assert {outcome.finish.reason for outcome in found.values()} == {"length", "stop"}
    assert all(outcome.finish.state is not None for outcome in found.values())


# -- what happens while a step is under way


def test_one_who_leaves_in_flight_hears_nothing_of_it_and_the_row_is_another_s(imitation):
    engine = Engine(model(), EngineConfig(rows=2))
    for name, prompt in (("leaves", [1, 2]), ("stays", [3, 4])):
        engine.add(Request(id=name, tokens=prompt, params=SamplingParams(max_tokens=8)))
    said = {"stays": [], "comes": []}
    for now in range(20):
        if now == 3:
            (output,) = engine.abort("leaves")
            assert output.token is None and output.finish.reason == "aborted"
            engine.add(Request(id="comes", tokens=[5], params=SamplingParams(max_tokens=8)))
        for output in engine.step():
            if output.request_id == "leaves":
                assert now < 3
            else:
                said[output.request_id].append(output.token)
    assert not engine.busy and said == {"stays": greedy(model(), [3, 4], 8), "comes": greedy(model(), [5], 8)}


def test_a_step_that_nobody_waits_for_is_forgotten(imitation):
    engine = Engine(model(), EngineConfig(rows=2))
    engine.add(Request(id="a", tokens=[1], params=SamplingParams(max_tokens=50, n=2)))
    engine.step()
    engine.step()
    assert engine._flight is not None
    engine.abort("a")
    assert engine._flight is None and not engine.busy and engine.step() == []
    assert play(engine, [Arrival(0, [1], SamplingParams(max_tokens=5))])[0, 0].tokens == greedy(model(), [1], 5)


@pytest.mark.parametrize("fails", ["launch", "read", "text"])
def test_after_a_failure_in_flight_everything_begins_anew(imitation, monkeypatch, fails):
    """Whether launching failed or what came after it, with a step under way."""
    lm = tiny(vocab_size=TOKENIZER.get_vocab_size())
    engine = Engine(lm, EngineConfig(rows=3), TOKENIZER)
    for i in range(2):
        engine.add(Request(id=str(i), tokens=[1 + i], params=SamplingParams(max_tokens=50)))
    for _ in range(3):
        engine.step()
    engine.add(Request(id="2", tokens=[3] * 9, params=SamplingParams(max_tokens=50)))
    where = {"launch": (Runner, "step"), "read": (Runner, "read"), "text": (ContinuationText, "push")}[fails]

    def fail(*args):
        raise RuntimeError("it failed")

    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        with pytest.raises(RuntimeError, match="it failed"):
            engine.step()
    engine.reset()
    assert not engine.busy and engine._flight is None
    assert not any(v.any() for layer in engine.pool.view(3).layers for v in layer.tensors().values())
    script = [Arrival(i, [4 + i, 5], SamplingParams(max_tokens=9)) for i in range(4)]
    for (i, _), outcome in play(engine, script).items():
        assert outcome.tokens == greedy(lm, script[i].prompt, 9)


def test_preempted_between_two_flights(imitation):
    engine = Engine(model(), EngineConfig(rows=2, quantum=2, cache_bytes=0))
    script = [Arrival(i % 3, [1 + i], SamplingParams(max_tokens=12)) for i in range(5)]
    for (i, _), outcome in play(engine, script).items():
        assert outcome.tokens == greedy(model(), [1 + i], 12)
    assert engine.counters.preemptions > 5


def test_the_next_step_is_launched_before_text_is_spelled_but_for_stop_strings(imitation, monkeypatch):
    lm = tiny(vocab_size=TOKENIZER.get_vocab_size())
    events, step, push = [], Runner.step, ContinuationText.push
    monkeypatch.setattr(Runner, "step", lambda self, *args: events.append("launch") or step(self, *args))
    monkeypatch.setattr(ContinuationText, "push", lambda self, token: events.append("spell") or push(self, token))
    for stop, order in (((), ["launch", "spell"]), (("never said",), ["spell", "launch"])):
        engine = Engine(lm, EngineConfig(), TOKENIZER)
        engine.add(Request(id="a", tokens=[1], params=SamplingParams(max_tokens=9, stop=stop)))
        engine.step()
        for _ in range(3):
            events.clear()
            engine.step()
            assert events == order
    ended = Engine(lm, EngineConfig(), TOKENIZER)
    events.clear()
    assert len(play(ended, [Arrival(0, [1], SamplingParams(max_tokens=4))])[0, 0].tokens) == 4
    assert events.count("launch") == 3  # none after the end


def test_a_prompt_is_read_behind_the_step_that_is_under_way(imitation, monkeypatch):
    """The running sequences' step is launched first; what comes between them is read in the meantime."""
    events, step, read = [], Runner.step, Runner.read
    monkeypatch.setattr(Runner, "step", lambda self, *args: events.append("launch") or step(self, *args))
    monkeypatch.setattr(Runner, "read", lambda self, *args: events.append("read") or read(self, *args))
    engine = Engine(model(), EngineConfig())
    engine.add(Request(id="a", tokens=[1], params=SamplingParams(max_tokens=9)))
    engine.step()
    engine.add(Request(id="b", tokens=[2], params=SamplingParams(max_tokens=9)))
    events.clear()
    assert engine._flight is not None
    assert [output.request_id for output in engine.step()] == ["a", "b"] and events == ["read", "launch"]


def test_without_graphs_nothing_is_launched_ahead():
    """On a CPU the next step would hold up what this one chose."""
    engine = Engine(model(), EngineConfig())
    engine.add(Request(id="a", tokens=[1], params=SamplingParams(max_tokens=9)))
    for _ in range(3):
        engine.step()
        assert engine._flight is None


# -- on a device


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 48])
def test_the_likeliest_token_on_a_device_is_the_first_of_equal_ones(rows):
    torch.manual_seed(rows)
    logits = torch.randn(rows, 128_256, device="cuda").mul(3).round().bfloat16()
    logits[:, 128_250:] = 99
    for vocabulary in (128_256, 128_250, 128_192):
        first = (logits[:, :vocabulary] == logits[:, :vocabulary].amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(likeliest(logits[:, :vocabulary]), first)
        assert torch.equal(logits[:, :vocabulary].argmax(-1), first)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_chosen_on_a_device_are_those_that_the_host_would_choose(temperature):
    """With those who come, end and leave while a step is under way; the host chooses where log probabilities are wanted."""
    lm = tiny("hybrid", dtype=torch.float32, d_model=64, d_state=32, headdim=16).to("cuda").eval()
    script = [
        Arrival(i // 2, [1 + i, 2, 3], SamplingParams(max_tokens=12 + 3 * i, temperature=temperature, seed=i),
                leaves=9 if i == 3 else None, keeps=i % 2 == 0)
        for i in range(7)
    ]  # fmt: skip
    asked = [replace(arrival, params=replace(arrival.params, logprobs=0)) for arrival in script]
    there, here, plain = (
        play(Engine(lm, EngineConfig(rows=4, cache_bytes=0, graphs=graphs)), arriving)
        for graphs, arriving in ((True, script), (True, asked), (False, script))
    )
    for key, outcome in there.items():
        assert outcome.tokens == here[key].tokens == plain[key].tokens
        if outcome.finish.state is not None:
            assert int(outcome.finish.state.tokens) == 3 + len(outcome.tokens) - 1
