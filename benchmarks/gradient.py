"""What a gradient costs: time of forward and backward over that of forward, and memory by the number of tokens.

The law: memory is linear in tokens. A (tokens, h, p, n) tensor, which a scan that keeps every state would hold, is shown
beside what was kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.checks import AGREE, Check, distance
from benchmarks.loop import cut, recurrence_inputs
from benchmarks.results import Tell
from benchmarks.timer import race
from mamba3 import Mamba3
from mamba3.ops.scan import run_scan
from mamba3.ops.types import Gate, Inputs


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Time on the layer of the 180M models; memory at 64 heads. `checked` tokens are held against the definition."""

    tokens: int = 2048
    checked: int = 96
    d_model: int = 768
    d_state: int = 128
    headdim: int = 64
    ranks: tuple[int, ...] = (1, 4)
    rounds: int = 5
    memory_heads: int = 64
    memory_tokens: tuple[int, ...] = (1024, 2048, 4096)


def cost(sizes: Sizes, tell: Tell) -> list[dict[str, Any]]:
    """A row for each rank: seconds of forward, and of forward with backward, in float32."""
    rows = []
    for rank in sizes.ranks:
        tell(f"recurrence, rank {rank}: cost of the gradient")
        inp, gate = _leaves(sizes.d_model, sizes, rank, sizes.tokens)
        checks = _gradients_hold(inp, gate, sizes.checked)
        result = race(
            {"forward": lambda i=inp, g=gate: _forward(i, g), "both": lambda i=inp, g=gate: _backward(i, g)},
            lambda outputs, checks=checks: checks,
            sizes.rounds,
        )
        rows.append(
            {
                "rank": rank,
                "tokens": sizes.tokens,
                "forward_s": result.seconds["forward"].to_dict(),
                "forward_and_backward_s": result.seconds["both"].to_dict(),
                "ratio": result.ratio("both", "forward").to_dict(),
                "checks": [check._asdict() for check in result.checks],
            }
        )
    return rows


def memory(sizes: Sizes, tell: Tell) -> list[dict[str, Any]]:
    """A row for each rank and number of tokens: bytes kept for the backward pass, and the peak of both passes.

    Neither counts inputs, which were there before; the peak counts their gradients.
    """
    rows = []
    for rank in sizes.ranks:
        for tokens in sizes.memory_tokens:
            tell(f"recurrence, rank {rank}: memory of the gradient at {tokens:,} tokens")
            inp, gate = _leaves(sizes.memory_heads * sizes.headdim // 2, sizes, rank, tokens)
            kept, _ = _bytes(lambda i=inp, g=gate: run_scan(i, g))
            _, peak = _bytes(lambda i=inp, g=gate: _backward(i, g))
            rows.append(
                {
                    "rank": rank,
                    "heads": sizes.memory_heads,
                    "tokens": tokens,
                    "inputs_bytes": sum(v.nbytes for v in _tensors(cut(inp, slice(None)), cut(gate, slice(None)))),
                    "kept_bytes": kept,
                    "peak_bytes": peak,
                    "kept_bytes_per_token": kept / tokens,
                    "peak_bytes_per_token": peak / tokens,
                    "all_states_bytes_per_token": 4 * sizes.memory_heads * sizes.headdim * sizes.d_state,
                }
            )
    return rows


def _tensors(inp: Inputs, gate: Gate) -> list[Tensor]:
    return [v for v in (*inp, *gate) if isinstance(v, Tensor)]


def _leaves(d_model: int, sizes: Sizes, rank: int, tokens: int) -> tuple[Inputs, Gate]:
    torch.manual_seed(0)
    layer = Mamba3(d_model, sizes.d_state, headdim=sizes.headdim, mimo_rank=rank)
    inp, gate = recurrence_inputs(layer, torch.randn(1, tokens, d_model))

    def leaf(values):
        return type(values)(*(v.detach().contiguous().requires_grad_() if isinstance(v, Tensor) else v for v in values))

    return leaf(inp), leaf(gate)


@torch.no_grad()
def _forward(inp: Inputs, gate: Gate) -> Tensor:
    return run_scan(inp, gate).y


def _backward(inp: Inputs, gate: Gate, impl: Any = "auto") -> list[Tensor]:
    y = run_scan(inp, gate, impl=impl).y
    return list(torch.autograd.grad(y.double().square().mean(), _tensors(inp, gate)))


def _gradients_hold(inp: Inputs, gate: Gate, tokens: int) -> list[Check]:
    span = slice(0, tokens)
    start = cut(inp, span), cut(gate, span)
    ours, truth = _backward(*start), _backward(*start, impl="reference")
    names = [f for v in start for f in v._fields if isinstance(getattr(v, f), Tensor)]
    return [
        Check(f"gradient of {name} = that of the definition, {tokens} tokens", distance(o, t), AGREE[torch.float32])
        for name, o, t in zip(names, ours, truth, strict=True)
    ]


def _bytes(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes still held when `work` has returned (its result is alive), and the most it held at once; by the allocator."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch 2.13's profiler writes a line to stderr at every start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    del result
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return held, peak
