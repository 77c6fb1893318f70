"""Laws of verification as graphs: on a CPU with graphs that are mere functions; with -m gpu with real ones."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba3.engine import Engine, EngineConfig, ModelDraft, NGramDraft, SamplingParams
from mamba3.engine import graphs as graphs_module
from mamba3.engine.speculation import Speculation
from mamba3.engine.state_pool import StatePool
from mamba3.engine.verify_graphs import VerifyGraphs
from tests.engine.cases import Arrival, arrivals, configs, greedy, model, play
from tests.engine.test_draft import Oracle
from tests.engine.test_engine import COPIES, LENGTHS, SEEDED, check_greedy
from tests.engine.test_pages import cramped, long_scripts
from tests.lm.test_model import tiny

KINDS = ["siso", "mimo", "hybrid"]
SHARED = [HealthCheck.function_scoped_fixture]  # the imitation is the same for all examples


@pytest.fixture
def at_once(monkeypatch, imitation):
    """Tokens of all places are chosen at once, as on a GPU."""
    made = Speculation.__init__

    def init(self, *arguments, **settings):
        made(self, *arguments, **settings)
        self._at_once = True

    monkeypatch.setattr(Speculation, "__init__", init)
    return imitation


@pytest.fixture
def verified(monkeypatch):
    """Rows of each verification that a graph did."""
    rows, verify = [], VerifyGraphs.verify
    monkeypatch.setattr(VerifyGraphs, "verify", lambda self, tokens: rows.append(len(tokens)) or verify(self, tokens))
    return rows


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, suppress_health_check=SHARED)
@given(data=st.data())
def test_greedy_with_graphs_and_guesses_is_the_plain_loop(kind, at_once, data):
    check_greedy(model(kind), data.draw(configs(speculate=3)), data.draw(arrivals(COPIES, most=6)))


@settings(max_examples=5, suppress_health_check=SHARED)
@given(config=configs(), script=arrivals(SEEDED, most=3), who=st.sampled_from(["oracle", "model", "n-gram"]))
def test_drawn_tokens_with_graphs_and_guesses_are_those_without(at_once, config, script, who):
    script = [replace(arrival, leaves=None) for arrival in script]
    draft = {"oracle": Oracle(model()), "model": ModelDraft(tiny(seed=3)), "n-gram": NGramDraft((1,))}[who]
    plain = play(Engine(model(), replace(config, graphs=False)), script)
    guessed = play(Engine(model(), replace(config, speculate=3), draft=draft), script)
    assert {key: o.tokens for key, o in plain.items()} == {key: o.tokens for key, o in guessed.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, suppress_health_check=SHARED)
@given(data=st.data())
def test_rows_of_padding_reach_nobody_and_stay(kind, at_once, data):
    """Free rows are NaN: tokens would show that one was read, and a row that is not NaN afterwards that one was written."""
    free = StatePool._zero
    filled = []

    def poison(self, row):
        free(self, row)
        for state in self._fixed():
            state.map(lambda v: v[row].fill_(math.nan))
        filled.append((self, row))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatePool, "_zero", poison)
        check_greedy(model(kind), data.draw(configs(speculate=2)), data.draw(arrivals(LENGTHS)))
    for pool, row in filled:
        assert all(v[row].isnan().all() for state in pool._fixed() for v in state.tensors().values())


@settings(max_examples=4, suppress_health_check=SHARED)
@given(config=cramped(), script=long_scripts(4))
def test_graphs_read_as_many_pages_as_guesses_want(at_once, config, script):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs_module, "SHORTEST", 1)
        check_greedy(model("hybrid"), replace(config, speculate=3), script)


def test_each_size_is_two_graphs_recorded_once_that_move_no_row(imitation, verified):
    engine = Engine(model(), EngineConfig(rows=3, cache_bytes=0, speculate=2), draft=ModelDraft(model()))
    assert list(engine.capture()) == [(1, 3), (2, 3), (3, 3)] * 2
    state = [v for layer in engine.pool.view(3).layers for v in layer.tensors().values()]
    assert len(imitation) == 9 and not any(v.any() for v in state)
    script = [Arrival(i, [1 + i], SamplingParams(max_tokens=9)) for i in range(3)]
    for _ in range(2):
        play(engine, script)
        assert len(imitation) == 9 and {1, 2, 3} == set(verified)
        engine.reset()  # the same rows, and so the same graphs


def test_one_graph_reads_whatever_is_guessed(imitation, verified):
    """The lengths of guesses differ, and so do the tokens chosen; the graphs do not."""
    prompt, params = [7, 3, 9, 7, 3], SamplingParams(max_tokens=30)
    engine = Engine(model(), EngineConfig(rows=1, speculate=5), draft=NGramDraft((1,)))
    assert play(engine, [Arrival(0, prompt, params)])[0, 0].tokens == greedy(model(), prompt, 30)
    assert len(verified) > 2 and len(imitation) <= 3


def test_a_verification_that_cannot_be_captured_runs_without(imitation, monkeypatch, caplog):
    record = graphs_module.record

    def fails(run, memory):
        if run.__name__ in ("read", "keep"):
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(run, memory)

    monkeypatch.setattr(graphs_module, "record", fails)
    engine = Engine(model("hybrid"), EngineConfig(rows=2, speculate=3), draft=ModelDraft(model("hybrid")))
    found = play(engine, [Arrival(0, [1, 2, 3], SamplingParams(max_tokens=9))])
    assert found[0, 0].tokens == greedy(model("hybrid"), [1, 2, 3], 9) and engine.counters.right_guesses
    assert engine.why_no_graphs is None  # of decode steps
    assert caplog.text.count("guesses are verified without CUDA graphs") == 1


def test_more_rows_than_the_largest_graph_has_are_stepped(imitation, verified, monkeypatch):
    monkeypatch.setattr("mamba3.engine.verify_graphs.MOST_ROWS", 2)
    engine = Engine(model(), EngineConfig(rows=4, speculate=2), draft=ModelDraft(model()))
    found = play(engine, [Arrival(0, [i + 1], SamplingParams(max_tokens=6 + 6 * (i > 1))) for i in range(4)])
    assert [found[i, 0].tokens for i in range(4)] == [greedy(model(), [i + 1], 6 + 6 * (i > 1)) for i in range(4)]
    assert set(verified) == {2}


def check_graphs(kind, device):
    """float32, three of four rows, a page of a hybrid almost full: logits, and the states after keeping 0 to 4 tokens, as often
    as graphs are replayed, are those without graphs; the fourth row stays 0."""
    torch.manual_seed(0)
    lm = tiny(kind, dtype=torch.float32, d_model=64, d_state=32, headdim=16).to(device).eval()
    engines = [Engine(lm, EngineConfig(rows=4, speculate=3)) for _ in range(2)]
    with torch.no_grad():
        _, before = lm.prefill(torch.randint(1, 50, (3, 62), device=device))
    for engine in engines:
        for i in range(3):
            row = engine.pool.add(before.select([i]))
            engine.pool.extend(row, 12)
    graphs, pool = VerifyGraphs(lm, engines[0].pool, 3), engines[1].pool
    for turn in range(3):
        tokens, counts = torch.randint(1, 50, (3, 4)).tolist(), [turn, 4, 1]
        logits, accept = graphs.verify(tokens)
        expected, draft = lm.verify(torch.tensor(tokens, device=device), pool.view(3, room=4))
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        accept(counts)
        draft.accept(counts)
        for row, count in enumerate(counts):
            for engine in engines:
                engine.pool.advance(row, count)
        for i in range(3):
            mine, theirs = ([layer.tensors() for layer in engine.pool.read(i).layers] for engine in engines)
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    fourth = [layer.map(lambda v: v[3]) for layer in engines[0].pool._fixed()]
    assert not any(v.any() for state in fourth for v in state.tensors().values())


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_keep_what_is_kept_without(kind, imitation, monkeypatch):
    monkeypatch.setattr(graphs_module, "SHORTEST", 1)
    check_graphs(kind, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_on_a_device_keep_what_is_kept_without(kind, monkeypatch):
    monkeypatch.setattr(graphs_module, "SHORTEST", 1)
    check_graphs(kind, "cuda")
