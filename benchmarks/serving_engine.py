"""What the engine reaches without a server around it: tokens a second by rows, memory a stream."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.results import Tell
from mamba3 import Mamba3LM
from mamba3.engine import Engine, EngineConfig, Request, SamplingParams

_PROMPT = 16
_ROUNDS = 3


def rows(model: Mamba3LM, counts: tuple[int, ...], tokens: int, tell: Tell) -> dict[str, Any]:
    """Decoding with so many rows in use, prompts read before: median of three rounds; bytes of state a stream."""
    speeds, steps, held = {}, {}, {}
    for count in counts:
        tell(f"{count} rows")
        seconds = []
        for turn in range(_ROUNDS + 1):
            engine = Engine(model, EngineConfig(rows=count, queue=count, cache_bytes=0))
            _fill(engine, count, tokens)
            began, before = _now(model), engine.counters.steps
            while engine.busy:
                engine.step()
            if turn:  # the first one warms up
                seconds.append((_now(model) - began) / (engine.counters.steps - before))
        step = sorted(seconds)[len(seconds) // 2]
        speeds[str(count)], steps[str(count)] = count / step, step
        held[str(count)] = engine.pool.nbytes / count
    return {"tokens_per_s": speeds, "step_s": steps, "state_bytes_a_stream": held}


def _fill(engine: Engine, count: int, tokens: int) -> None:
    """Let every row have a sequence that is at its first token, and will choose `tokens` more."""
    for i in range(count):
        prompt = [(7 * i + j) % 256 for j in range(_PROMPT)]
        engine.add(Request(id=str(i), tokens=prompt, params=SamplingParams(max_tokens=10**6)))
    while engine.pool.used < count:
        engine.step()
    for sequence in engine.scheduler.running:
        object.__setattr__(sequence.request.params, "max_tokens", len(sequence.chosen) + tokens)


def _now(model: Mamba3LM) -> float:
    if model.embedding.weight.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()
