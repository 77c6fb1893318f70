"""What an engine reads before requests come, so that its kernels are compiled."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba3.engine import Engine, EngineConfig, Request, SamplingParams
from mamba3.engine.rehearsal import packs, rehearse
from tests.engine.cases import model


@given(chunk=st.integers(1, 700), step=st.integers(1, 2000), prompts=st.integers(1, 80), exact=st.booleans())
def test_no_pack_is_more_than_a_step_reads(chunk, step, prompts, exact):
    config = EngineConfig(prefill_chunk=chunk, step_tokens=step, prompts=prompts, exact=exact, cache_grid=chunk)
    found = packs(config)
    assert all(sum(pack) <= step and len(pack) <= prompts and 1 <= min(pack) <= max(pack) <= chunk for pack in found)
    assert max(pack[0] for pack in found) > min(chunk, step) - 64
    assert exact or prompts == 1 or step == 1 or max(map(len, found)) == min(prompts, step)


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
def test_a_rehearsal_leaves_nothing_behind(kind):
    lm, config = model(kind), EngineConfig(rows=2, prefill_chunk=70, step_tokens=140, prompts=2)
    calls = list(rehearse(lm, config))
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))] and len(calls) == 2 * len(packs(config))

    def said(engine):
        engine.add(Request(id="a", tokens=[1, 2, 3], params=SamplingParams(max_tokens=5)))
        return [output.token for _ in range(9) for output in engine.step()]

    rehearsed = Engine(lm, config)
    list(rehearse(rehearsed.model, rehearsed.config))
    assert said(rehearsed) == said(Engine(lm, config)) and len(said(Engine(lm, config))) == 5


def test_on_a_cpu_nothing_is_compiled():
    assert list(Engine(model()).rehearse()) == []


def test_a_step_that_does_not_fit_is_told_with_what_to_change(monkeypatch):
    lm = copy.copy(model())  # tests share the model

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(lm, "prefill", full)
    with pytest.raises(
        ValueError, match=r"512 of 1 prompts do not fit .* lower step_tokens, prefill_chunk or rows.*3\.00 GiB"
    ):
        list(rehearse(lm, EngineConfig()))
