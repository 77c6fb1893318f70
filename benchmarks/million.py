"""A million tokens: does an error grow with the number of tokens read?

Three routes through the same tokens in float32 (prefill in short pieces, prefill in long pieces, step by step) against the
same inputs in float64, and the layer in float32 against the layer in float64. The float64 run is itself held against the
definition on its first tokens. Measured at positions spaced evenly on a logarithmic scale:

    y        |y - y*| / |y*| over a window of tokens that ends there
    phi      the largest angle between the two, on the circle
    S        |S - S*| / |S*|, as it is and, as S_unturned, with both turned back by their own phi

u has one constant channel that pushes every theta_raw up, so that the angle turns one way and goes round thousands of times;
beside it stands the error of the same sum kept as a plain float32 number. With `long_memory` every head decays at the floor
(A = -1e-4) and remembers hundreds of thousands of tokens instead of hundreds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from benchmarks.checks import Check, angle_distance, distance, require
from benchmarks.loop import PER_TOKEN, cut, double, recurrence_inputs
from benchmarks.results import Tell
from mamba3 import Mamba3
from mamba3.nn.mixer import Projected
from mamba3.ops import State
from mamba3.ops.rotate import rotate_pairs
from mamba3.ops.scan import run_scan, run_step
from mamba3.ops.types import Gate, Inputs

TRUTH_BOUND = 1e-10
THETA_PUSH, A_PUSH = 0.5, -1e6  # of theta_raw and A_raw; f(-1e6) lies below the floor of A for either decay
BLOCK = 4096

Advance = Callable[[int, int, State | None], tuple[Tensor, State]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A small layer; `stepped` tokens go step by step, `checked` through the definition."""

    tokens: int = 1_000_000
    stepped: int = 100_000
    checked: int = 4096
    piece: int = 2048
    long_piece: int = 131_072
    window: int = 512
    d_model: int = 16
    d_state: int = 16
    headdim: int = 8
    models: tuple[tuple[int, bool], ...] = ((1, False), (2, False), (1, True))  # rank, long_memory


class Reading(NamedTuple):
    """y of each window and the state there, by the position where the window ends."""

    y: dict[int, Tensor]
    states: dict[int, State]


def positions(tokens: int, window: int) -> list[int]:
    """The first window's end, then four positions a decade, powers of ten among them, and the last token."""
    marks = {round(10 ** (i / 4)) for i in range(4 * len(str(tokens)))}
    return sorted({window, tokens, *(m for m in marks if 1.5 * window < m < tokens)})


def turning_layer(sizes: Sizes, rank: int, long_memory: bool) -> Mamba3:
    """A layer that channel 0 of u pushes: theta to one sign and, with long_memory, A to its floor."""
    torch.manual_seed(0)
    layer = Mamba3(sizes.d_model, sizes.d_state, headdim=sizes.headdim, mimo_rank=rank)
    rows = Projected(*layer.in_proj.weight.detach().split(layer.splits))
    rows.theta[:, 0] = THETA_PUSH
    if long_memory:
        rows.A[:, 0] = A_PUSH
    return layer.requires_grad_(False)


def tokens_of(sizes: Sizes) -> Tensor:
    """u [1, t, d_model]; channel 0 is one."""
    u = torch.randn(1, sizes.tokens, sizes.d_model, generator=torch.Generator().manual_seed(1))
    u[..., 0] = 1
    return u


@torch.no_grad()
def measure(sizes: Sizes, tell: Tell) -> list[dict[str, Any]]:
    """One entry a model: the errors of each route by position, the turns, and what was checked."""
    u = tokens_of(sizes)
    return [_measure_model(sizes, u, rank, long_memory, tell) for rank, long_memory in sizes.models]


def _measure_model(sizes: Sizes, u: Tensor, rank: int, long_memory: bool, tell: Tell) -> dict[str, Any]:
    name = f"rank {rank}{', long memory' if long_memory else ''}"
    layer = turning_layer(sizes, rank, long_memory)
    tell(f"{name}: inputs")
    inp, gate = inputs_of(layer, u)
    exact = turning_layer(sizes, rank, long_memory).double()

    def scan(start: int, stop: int, state: State | None) -> tuple[Tensor, State]:
        span = slice(start, stop)
        return run_scan(cut(inp, span), cut(gate, span), state)

    def scan_exactly(start: int, stop: int, state: State | None) -> tuple[Tensor, State]:
        span = slice(start, stop)
        return run_scan(double(cut(inp, span)), double(cut(gate, span)), state)

    def step(start: int, stop: int, state: State | None) -> tuple[Tensor, State]:
        state = layer.init_state(1) if state is None else state
        y, state = run_step(cut(inp, start), cut(gate, start), state, inplace=True)
        return y.unsqueeze(1), state

    def layer_scan(start: int, stop: int, state: State | None) -> tuple[Tensor, State]:
        return layer.prefill(u[:, start:stop], state)

    def layer_exactly(start: int, stop: int, state: State | None) -> tuple[Tensor, State]:
        return exact.prefill(u[:, start:stop].double(), state)

    check = _definition_holds(inp, gate, sizes.checked)
    require([check])
    marks = positions(sizes.tokens, sizes.window)

    def read(route: str, advance: Advance, piece: int, tokens: int = sizes.tokens) -> Reading:
        tell(f"{name}: {route}")
        return follow(advance, tokens, piece, [m for m in marks if m <= tokens], sizes.window)

    truth = read("float64", scan_exactly, BLOCK)
    routes = {
        f"prefill in pieces of {sizes.piece:,}": (read("pieces", scan, sizes.piece), truth),
        f"prefill in pieces of {sizes.long_piece:,}": (read("long pieces", scan, sizes.long_piece), truth),
        "step by step": (read("step by step", step, 1, sizes.stepped), truth),
    }
    layer_truth = read("layer, float64", layer_exactly, BLOCK)
    routes["layer"] = (read("layer", layer_scan, sizes.piece), layer_truth)
    turns = total_angle(inp, marks)
    return {
        "rank": rank,
        "long_memory": long_memory,
        "tokens": sizes.tokens,
        "window": sizes.window,
        "positions": marks,
        "angle_rad": turns["float64"],
        "plain_float32_angle_error_rad": turns["error"],
        "routes": {route: errors(reading, against) for route, (reading, against) in routes.items()},
        "checks": [check._asdict()],
    }


def inputs_of(layer: Mamba3, u: Tensor) -> tuple[Inputs, Gate]:
    """The recurrence's inputs for all tokens, computed block by block: the same bits whatever the pieces they are read in."""
    blocks = [recurrence_inputs(layer, piece) for piece in u.split(BLOCK, dim=1)]

    def join(values):
        names = [f for f in values[0]._fields if f in PER_TOKEN and getattr(values[0], f) is not None]
        return values[0]._replace(**{f: torch.cat([getattr(v, f) for v in values], 1) for f in names})

    return join([inp for inp, _ in blocks]), join([gate for _, gate in blocks])


def follow(advance: Advance, tokens: int, piece: int, marks: Iterable[int], window: int) -> Reading:
    """Read all tokens in pieces that also end at every mark; keep the windows and states there."""
    marks = list(marks)
    edges = sorted({*range(0, tokens, piece), *marks, *(m - window for m in marks), tokens})
    ys: dict[int, list[Tensor]] = {m: [] for m in marks}
    states: dict[int, State] = {}
    state: State | None = None
    for start, stop in itertools.pairwise(edges):
        y, state = advance(start, stop, state)
        for m in marks:
            if m - window <= start and stop <= m:
                ys[m].append(y)
        if stop in ys:
            states[stop] = state.clone()
    return Reading({m: torch.cat(pieces, 1) for m, pieces in ys.items()}, states)


def errors(ours: Reading, truth: Reading) -> dict[str, list[Any]]:
    """Errors of y, phi and S at the positions that `ours` reached."""
    marks = list(ours.y)

    def unturned(state: State) -> Tensor:
        phi = state.phi.double().unsqueeze(-2)
        return rotate_pairs(state.S.double(), phi.cos(), -phi.sin())

    return {
        "positions": marks,
        "y": [distance(ours.y[m], truth.y[m]) for m in marks],
        "phi_rad": [angle_distance(ours.states[m].phi, truth.states[m].phi) for m in marks],
        "S": [distance(ours.states[m].S, truth.states[m].S) for m in marks],
        "S_unturned": [distance(unturned(ours.states[m]), unturned(truth.states[m])) for m in marks],
    }


def total_angle(inp: Inputs, marks: list[int]) -> dict[str, list[float]]:
    """The largest angle turned in all, at each mark, and the error of keeping it as a plain float32 sum."""
    index = torch.tensor(marks) - 1
    largest, error = torch.zeros(len(marks), dtype=torch.float64), torch.zeros(len(marks), dtype=torch.float64)
    for h, a in itertools.product(range(inp.dt.shape[-1]), range(inp.theta.shape[-1])):
        turned = inp.theta[0, :, a] * inp.dt[0, :, h]
        exact = (inp.theta[0, :, a].double() * inp.dt[0, :, h].double()).cumsum(0)[index]
        plain = torch.from_numpy(numpy.cumsum(turned.numpy(), dtype=numpy.float32))[index]
        largest = torch.maximum(largest, exact.abs())
        error = torch.maximum(error, (plain.double() - exact).abs())
    return {"float64": largest.tolist(), "error": error.tolist()}


def _definition_holds(inp: Inputs, gate: Gate, tokens: int) -> Check:
    span = slice(0, tokens)
    ours, truth = (
        run_scan(double(cut(inp, span)), double(cut(gate, span)), impl=impl) for impl in ("chunked", "reference")
    )
    error = max(distance(ours.y, truth.y), distance(ours.state.S, truth.state.S))
    return Check(f"chunked = definition in float64, {tokens:,} tokens", error, TRUTH_BOUND)
