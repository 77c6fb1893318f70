"""Laws of the decode graphs: on a CPU with graphs that are mere functions; with -m gpu with real ones."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba3.engine import Engine, EngineConfig, Request, SamplingParams
from mamba3.engine import graphs as graphs_module
from mamba3.engine.graphs import sizes, why_not
from mamba3.engine.state_pool import StatePool
from tests.engine.cases import Arrival, arrivals, configs, greedy, model, play
from tests.engine.test_engine import COPIES, LENGTHS, check_greedy
from tests.engine.test_pages import cramped, long_scripts
from tests.lm.test_model import tiny


@given(rows=st.integers(1, 1024))
def test_a_size_is_at_most_half_more_than_there_are_sequences(rows):
    found = sizes(rows)
    assert found[-1] == rows and found == sorted(set(found))
    for small, large in itertools.pairwise(found):
        assert large <= max(2 * small, small + 1) and (small < 8 or 2 * large <= 3 * small)


KINDS = ["siso", "mimo", "hybrid"]
SHARED = [HealthCheck.function_scoped_fixture]  # the imitation is the same for all examples


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, suppress_health_check=SHARED)
@given(data=st.data())
def test_greedy_with_graphs_is_the_plain_loop(kind, imitation, data):
    check_greedy(model(kind), data.draw(configs()), data.draw(arrivals(COPIES, most=9)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, suppress_health_check=SHARED)
@given(data=st.data())
def test_rows_of_padding_are_neither_read_nor_written(kind, imitation, data):
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
        check_greedy(model(kind), data.draw(configs()), data.draw(arrivals(LENGTHS)))
    for pool, row in filled:
        assert all(v[row].isnan().all() for state in pool._fixed() for v in state.tensors().values())


@settings(max_examples=5, suppress_health_check=SHARED)
@given(config=cramped(), script=long_scripts(4))
def test_graphs_read_as_many_pages_as_the_longest_sequence_has(imitation, config, script):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs_module, "SHORTEST", 1)
        check_greedy(model("hybrid"), config, script)


def test_each_size_is_recorded_once_and_moves_no_row(imitation):
    engine = Engine(model(), EngineConfig(rows=6, cache_bytes=0))
    assert list(engine.capture()) == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(imitation) == 4 and not any(
        v.any() for layer in engine.pool.view(6).layers for v in layer.tensors().values()
    )
    script = [Arrival(i, [1 + i], SamplingParams(max_tokens=9)) for i in range(6)]
    play(engine, script)
    assert len(imitation) == 4
    engine.reset()  # the same rows, and so the same graphs
    play(engine, script)
    assert len(imitation) == 4


@pytest.mark.parametrize("early", [False, True])
def test_a_step_that_cannot_be_captured_runs_without(early, imitation, monkeypatch, caplog):
    def fails(run, memory):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs_module, "record", fails)
    engine = Engine(model("hybrid"), EngineConfig(rows=2))
    assert engine.why_no_graphs is None
    if early:
        assert list(engine.capture()) == []
    found = play(engine, [Arrival(0, [1, 2, 3], SamplingParams(max_tokens=5))])
    assert found[0, 0].tokens == greedy(model("hybrid"), [1, 2, 3], 5)
    for _ in range(2):
        assert "rows could not be captured (operation not permitted" in engine.why_no_graphs
        engine.reset()
    assert caplog.text.count("steps run without CUDA graphs") == 1


def test_why_there_are_no_graphs():
    lm = model()
    assert why_not(lm, EngineConfig(graphs=False)) == "the engine was told to do without (graphs=False)"
    assert Engine(lm).why_no_graphs == "CUDA graphs need a CUDA device, and the model is on cpu"
    assert list(Engine(lm).capture()) == []


# -- on a device


def run_all(engine, requests, joins):
    """Tokens of each request; request i joins after joins[i] steps."""
    said = {request.id: [] for request in requests}
    for now in itertools.count():
        for request, joined in zip(requests, joins, strict=True):
            if joined == now:
                engine.add(request)
        for output in engine.step():
            if output.token is not None:
                said[output.request_id].append(output.token)
        if not engine.busy and now > max(joins):
            return list(said.values())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_on_a_device_choose_the_tokens_of_the_step_without(kind):
    """float32; up to nine sequences that come and go; the plain loop's tokens and those of an engine without graphs."""
    lm = tiny(kind, dtype=torch.float32, d_model=64, d_state=32, headdim=16).to("cuda").eval()
    prompts = [[1 + (7 * i + j) % 49 for j in range(3 + 5 * i)] for i in range(9)]
    joins, lengths = [0, 0, 1, 4, 4, 4, 9, 15, 15], [20, 3, 12, 25, 1, 8, 30, 5, 14]
    requests = [
        Request(id=str(i), tokens=prompt, params=SamplingParams(max_tokens=count))
        for i, (prompt, count) in enumerate(zip(prompts, lengths, strict=True))
    ]
    engine = Engine(lm, EngineConfig(rows=9, cache_bytes=0))
    assert engine.why_no_graphs is None
    with_graphs = run_all(engine, requests, joins)
    assert run_all(engine, requests, joins) == with_graphs
    assert run_all(Engine(lm, EngineConfig(rows=9, cache_bytes=0, graphs=False)), requests, joins) == with_graphs
    plain = [
        lm.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=count).tokens[0].tolist()
        for prompt, count in zip(prompts, lengths, strict=True)
    ]
    assert plain == with_graphs
