"""python -m benchmarks.weight_bits: what 8 and 4 bits a weight give on this GPU: memory, a decode step's time, logits.

A model with random weights at a published size; a step is replayed from a CUDA graph, contestants interleaved.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, results
from mamba3 import Mamba3LM
from mamba3.export import quantize_weights
from mamba3.lm.presets import preset

PROMPT = 128


def bytes_of(model: Mamba3LM) -> int:
    """Bytes of the weights: every tensor inside a quantised one counted."""

    def size(t: Tensor) -> int:
        flatten = getattr(t, "__tensor_flatten__", None)
        return sum(size(getattr(t, name)) for name in flatten()[0]) if flatten else t.numel() * t.element_size()

    return sum(size(p) for p in model.parameters())


def graphed(model: Mamba3LM, batch: int) -> torch.cuda.CUDAGraph:
    """One decode step, ready to be replayed."""
    state, ids = model.init_state(batch), torch.zeros(batch, dtype=torch.long, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.step(ids, state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step(ids, state)
    return graph


def interleaved(graphs: dict[str, torch.cuda.CUDAGraph], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a replay of each: the median and the quartiles."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(5):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) / 5)
    quarters = ("low", "median", "high")
    return {name: dict(zip(quarters, statistics.quantiles(v, n=4), strict=True)) for name, v in times.items()}


@torch.no_grad()
def measure(name: str, batches: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Everything, as one JSON object."""
    torch.manual_seed(0)
    whole = Mamba3LM(preset(name, vocab_size=32_000), device="cuda", dtype=torch.bfloat16)
    models = {"bfloat16": whole.eval()}
    for bits in (8, 4):
        models[f"{bits} bits"] = copy.deepcopy(whole)
        quantize_weights(models[f"{bits} bits"], bits)
    ids = torch.randint(32_000, (4, PROMPT), device="cuda")
    logits = {key: model(ids).float() for key, model in models.items()}
    truth = logits["bfloat16"]
    return {
        "where": environment.describe() | {"gpu": torch.cuda.get_device_name()},
        "model": f"{name}, vocabulary 32,000, random weights", "parameters": whole.num_parameters(),
        "bytes of weights": {key: bytes_of(model) for key, model in models.items()},
        "logits, relative distance": {key: float((v - truth).norm() / truth.norm()) for key, v in logits.items()},
        "ms of a step": {
            batch: interleaved({key: graphed(model, batch) for key, model in models.items()}, repeats)
            for batch in batches
        },
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="siso-1.5b", help="a preset of mamba3.lm")
    found = measure(parser.parse_args().model, (1, 8, 32), 20)
    text = json.dumps(found, indent=2)
    results.FOLDER.mkdir(parents=True, exist_ok=True)
    (results.FOLDER / f"{time.strftime('%Y-%m-%d')}-weight-bits.json").write_text(text + "\n")
    print(text)  # noqa: T201 (a script)
