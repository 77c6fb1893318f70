"""A whole model on this GPU: `mamba3 bench model` in a checkout. Seconds to read prompts, and to read and then decode as many
tokens, which is what the paper's Table 7 has, at batch 128 in bfloat16.

Weights and prompts are random; each next token is the likeliest. A decode step is one CUDA graph, whose tensors the prompt's
state is copied to. Prompts are read in slices of the batch of at most `SLICE` tokens, which bounds memory. Floors are those of
`kernel_sizes`: products at the measured matrix rate for prompts, weights and state at the measured copy rate for a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, results
from benchmarks.checks import distance
from benchmarks.cuda import ceilings
from benchmarks.plots import draw_model
from mamba3.lm import Mamba3LM, preset
from mamba3.lm.state import LMState
from mamba3.ops import State

SLICE = 2**17
STEPS = 32  # of which the time of one is the mean
# A step and a prefill of the same token in bfloat16: roundings of 24 layers apart.
AGREE = 0.05
Say = Callable[[str], None]


class Decoder:
    """A batch of sequences: prompts are read into its state, and a graph of one step moves all of them on."""

    def __init__(self, model: Mamba3LM, batch: int, kept: torch.dtype) -> None:
        self.model, self.batch = model, batch
        layers = [
            layer._replace(S=layer.S.to(kept)) for layer in model.init_state(batch).layers if isinstance(layer, State)
        ]
        assert len(layers) == len(model.layers)
        self.state = LMState(list(layers), torch.zeros(batch, dtype=torch.int64, device="cuda"))
        self.token = torch.zeros(batch, dtype=torch.int64, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _choose(self, logits: Tensor) -> Tensor:
        return logits[..., : self.model.config.vocab_size].argmax(-1)

    def _step(self) -> None:
        logits, _ = self.model.step(self.token, self.state)
        self.token.copy_(self._choose(logits))

    def read(self, ids: Tensor) -> None:
        """Prompts [b, t]; the state and the next tokens are those after them."""
        rows = max(1, SLICE // ids.shape[1])
        for first in range(0, self.batch, rows):
            part = slice(first, first + rows)
            logits, state = self.model.prefill(ids[part], last_only=True)
            for mine, theirs in zip(self.state.layers, state.layers, strict=True):
                assert isinstance(mine, State) and isinstance(theirs, State)
                for kept, new in zip(mine[:4], theirs[:4], strict=True):
                    kept[part].copy_(new)
            self.token[part].copy_(self._choose(logits[:, -1]))

    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            self.graph.replay()


def check(model: Mamba3LM) -> float:
    """How far the logits of a prompt's last token lie from those of a step after the prompt without it; ValueError if far."""
    ids = torch.randint(0, model.config.vocab_size, (2, 130), device="cuda")
    whole, _ = model.prefill(ids, last_only=True)
    _, state = model.prefill(ids[:, :-1], last_only=True)
    apart = distance(model.step(ids[:, -1], state)[0], whole[:, -1])
    if not apart <= AGREE:
        raise ValueError(f"a step's logits lie {apart:.1e} from the prefill's, so nothing is timed; allowed {AGREE}.")
    return apart


def _seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _floors(model: Mamba3LM, decoder: Decoder, tokens: int, top: dict[str, float]) -> dict[str, float]:
    """Seconds of the prompts' matrix products (the head reads last tokens alone) and of one step's weights and state."""
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("embedding"))
    flops = 2 * decoder.batch * (weights * tokens + model.embedding.weight.numel())
    moved = 2 * sum(layer.nbytes for layer in decoder.state.layers) + 2 * (weights + model.embedding.weight.numel())
    return {"prefill_s": flops / top["matmul_TFLOPs"] / 1e12, "step_s": moved / top["copy_TBs"] / 1e12}


def measure(model: Mamba3LM, decoder: Decoder, tokens: int, repeats: int, top: dict[str, float]) -> dict[str, Any]:
    """Prefill alone, and prefill and decoding together, `repeats` times each; peak memory of both, weights included."""
    ids = torch.randint(0, model.config.vocab_size, (decoder.batch, tokens), device="cuda")

    def both() -> None:
        decoder.read(ids)
        decoder.decode(tokens)

    torch.cuda.reset_peak_memory_stats()
    decoder.read(ids)
    prefill = [_seconds(lambda: decoder.read(ids)) for _ in range(repeats + 1)]
    total = [_seconds(both) for _ in range(repeats)]
    step = [_seconds(lambda: decoder.decode(STEPS)) / STEPS for _ in range(3)]
    return {
        "tokens": tokens, "slices": -(-decoder.batch // max(1, SLICE // tokens)),
        **{name: {"median": statistics.median(v), "min": min(v), "max": max(v)}
           for name, v in (("prefill_s", prefill), ("total_s", total), ("step_s", step))},
        "floors": _floors(model, decoder, tokens, top), "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        "prefill_kernels_ms": profile(lambda: decoder.read(ids)), "step_kernels_ms": profile(decoder._step),
    }  # fmt: skip


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kernel, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    times = {e.key[:80]: e.self_device_time_total / 1e3 for e in seen.key_averages() if e.self_device_time_total}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:16])


@torch.no_grad()
def run(
    folder: Path,
    *,
    models: Sequence[str],
    batch: int,
    tokens: Sequence[int],
    states: Sequence[str],
    repeats: int,
    say: Say,
) -> Path:
    """Every model with every dtype of the state, written to <date>-<device>-model.json and .png in `folder`.

    Raises ValueError where there is no CUDA device, for an unknown preset, and where a step does not agree with prefill.
    """
    if not torch.cuda.is_available():
        raise ValueError("the model's benchmark needs a CUDA device, and torch finds none here; run it on a GPU.")
    torch.manual_seed(0)
    where, top, rows, out = environment.describe("cuda"), ceilings(), [], None
    say(f"{where['device']}, commit {where['commit']}, ceilings {top}")
    built = {name: Mamba3LM(preset(name), device="cuda", dtype=torch.bfloat16).requires_grad_(False) for name in models}
    apart = {name: check(model) for name, model in built.items()}
    for count in tokens:
        for kept in states:
            for name, model in built.items():
                row = {"model": name, "batch": batch, "state": kept, "step_from_prefill": apart[name]}
                row |= measure(model, Decoder(model, batch, getattr(torch, kept)), count, repeats, top)
                rows.append(row)
                say(f"{name}, {kept} state, {count} tokens: prefill {row['prefill_s']['median']:.3f} s, with decoding "
                    f"{row['total_s']['median']:.3f} s, step {1e3 * row['step_s']['median']:.3f} ms, floors "
                    f"{row['floors']['prefill_s']:.3f} s and {1e3 * row['floors']['step_s']:.3f} ms, "
                    f"{row['peak_GiB']:.1f} GiB")  # fmt: skip
                out = results.write("model", where, False, {"ceilings": top, "models": rows}, draw_model, folder)
                torch.cuda.empty_cache()
    assert out is not None
    return out
