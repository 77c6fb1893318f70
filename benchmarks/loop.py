"""Prefill against the token loop: the same layer, tokens and result, two orders of work.

    prefill:  y, state = prefill(u)            loop:  for every t:  y_t, state = step(u_t, state), the state in place

At two levels: the layer (`Mamba3.prefill`, `Mamba3.step`, projections included) and the recurrence alone (`ops.scan`,
`ops.step`, on inputs that the layer computed beforehand).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import Check, agree, states_agree
from benchmarks.results import Tell
from benchmarks.timer import race
from mamba3 import Mamba3
from mamba3.ops import State
from mamba3.ops.scan import run_scan, run_step
from mamba3.ops.types import Gate, Inputs

GOAL = 20.0
PER_TOKEN = ("x", "dt", "A", "lam", "theta", "B", "C", "tick", "z")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The layer of the 180M models at one sequence of 2,048 tokens."""

    tokens: int = 2048
    d_model: int = 768
    d_state: int = 128
    headdim: int = 64
    ranks: tuple[int, ...] = (1, 4)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    rounds: int = 3


def recurrence_inputs(layer: Mamba3, u: Tensor) -> tuple[Inputs, Gate]:
    """What the layer hands to the recurrence for u [b, t, d_model]."""
    with torch.no_grad():
        row = layer._project(u)
        return layer._inputs(row), layer._gate(row.z)


def cut(values: Any, span: slice | int) -> Any:
    """Inputs or Gate of a span of tokens, or of one token without its axis."""
    return values._replace(**{name: v[:, span] for name in PER_TOKEN if (v := getattr(values, name, None)) is not None})


def double(values: Any) -> Any:
    """Inputs or Gate with every tensor in float64."""
    return type(values)(*(v.double() if isinstance(v, Tensor) else v for v in values))


@torch.no_grad()
def measure(sizes: Sizes, tell: Tell) -> list[dict[str, Any]]:
    """A row for each level, rank and dtype: seconds of both, their ratio, and whether it meets the goal."""
    rows = []
    for rank in sizes.ranks:
        for dtype in sizes.dtypes:
            torch.manual_seed(0)
            layer = Mamba3(sizes.d_model, sizes.d_state, headdim=sizes.headdim, mimo_rank=rank, dtype=dtype)
            u = torch.randn(1, sizes.tokens, sizes.d_model, dtype=dtype)
            for level, contestants in (("layer", _layer(layer, u)), ("recurrence", _recurrence(layer, u))):
                tell(f"{level}, rank {rank}, {str(dtype).removeprefix('torch.')}: prefill against the token loop")
                result = race(contestants, lambda outputs, dtype=dtype: _equal(outputs, dtype), sizes.rounds)
                ratio = result.ratio("loop", "prefill")
                rows.append(
                    {
                        "level": level,
                        "rank": rank,
                        "dtype": str(dtype).removeprefix("torch."),
                        "tokens": sizes.tokens,
                        "prefill_s": result.seconds["prefill"].to_dict(),
                        "loop_s": result.seconds["loop"].to_dict(),
                        "ratio": ratio.to_dict(),
                        "goal": GOAL,
                        "met": ratio.median >= GOAL,
                        "checks": [check._asdict() for check in result.checks],
                    }
                )
    return rows


def _equal(outputs: dict[str, tuple[Tensor, State]], dtype: torch.dtype) -> list[Check]:
    (y, state), (loop_y, loop_state) = outputs["prefill"], outputs["loop"]
    return [
        agree("y of prefill = y of the token loop", y, loop_y, dtype),
        states_agree("state of prefill = state of the token loop", state, loop_state, dtype),
    ]


def _layer(layer: Mamba3, u: Tensor) -> dict[str, Callable[[], tuple[Tensor, State]]]:
    def loop() -> tuple[Tensor, State]:
        state, ys = layer.init_state(1), []
        for t in range(u.shape[1]):
            y, state = layer.step(u[:, t], state)
            ys.append(y)
        return torch.stack(ys, 1), state

    return {"prefill": lambda: layer.prefill(u), "loop": loop}


def _recurrence(layer: Mamba3, u: Tensor) -> dict[str, Callable[[], tuple[Tensor, State]]]:
    inp, gate = recurrence_inputs(layer, u)
    tokens = [(cut(inp, t), cut(gate, t)) for t in range(u.shape[1])]

    def loop() -> tuple[Tensor, State]:
        state, ys = layer.init_state(1), []
        for inp_t, gate_t in tokens:
            y, state = run_step(inp_t, gate_t, state, inplace=True)
            ys.append(y)
        return torch.stack(ys, 1), state

    def prefill() -> tuple[Tensor, State]:
        y, state = run_scan(inp, gate)
        return y, state

    return {"prefill": prefill, "loop": loop}
