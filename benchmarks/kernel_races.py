"""Races of the kernels: the scan forward and backward beside its rivals, and a layer's decode step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.checks import distance
from benchmarks.cuda import Contestant, graphed, race
from benchmarks.kernel_sizes import D_MODEL, HEADDIM, STATE, floors, inputs
from benchmarks.rivals import Unready, passes, rivals
from mamba3 import ops
from mamba3.nn.mixer import Mamba3
from mamba3.ops.types import State

OURS = "triton"
# How far the y of the PyTorch path, which is asked at the first shape alone, may lie from ours: both round to bfloat16.
AGREE = 1e-2
STEPS = 20  # decode steps a graph
STATES = ("float32", "float16", "bfloat16")  # dtypes of S
Say = Callable[[str], None]


def _scan(values: dict[str, Any], impl: Any) -> Callable[..., Tensor]:
    names = list(values)
    return lambda *v: ops.scan(**dict(zip(names, v, strict=True)), impl=impl).y


def ours(b: int, t: int, r: int, backward: bool) -> Contestant:
    """Our kernels at a shape."""
    values = inputs(b, t, r, torch.bfloat16)
    return passes(_scan(values, "triton"), list(values.values()), backward)


class Settings(NamedTuple):
    """What is raced: shapes by rank and batches of a step; rounds; seconds a rival may take to be ready at a shape, None for
    no rivals; what was not compiled ahead, and why; whether the PyTorch path is timed too; the measured `ceilings`."""

    shapes: Mapping[int, Sequence[tuple[int, int]]]
    batches: Sequence[int]
    rounds: int
    ready_s: float | None
    unready: Unready
    chunked: bool
    top: dict[str, float]


def scans(backward: bool, settings: Settings, some: slice, say: Say) -> Iterator[dict[str, Any]]:
    """Forward, or forward and backward, at the sizes of the 1.5B layer: a row for each of `some` of every rank's shapes."""
    for r, shapes in settings.shapes.items():
        for b, t in shapes[some]:
            yield _race_scan(backward, r, b, t, (b, t) == shapes[0], settings, say)
            torch.cuda.empty_cache()


def _race_scan(backward: bool, r: int, b: int, t: int, first: bool, settings: Settings, say: Say) -> dict[str, Any]:
    values = inputs(b, t, r, torch.bfloat16)
    contestants = {OURS: passes(_scan(values, "triton"), list(values.values()), backward)}
    if settings.chunked and first:
        contestants["chunked"] = passes(_scan(values, "chunked"), list(values.values()), backward)
        _require_agreement(values)
    others, left_out = {}, {}
    if settings.ready_s is not None:
        others, left_out = rivals(r, b, t, backward, settings.ready_s, settings.unready)
    times, without = race(contestants | others, OURS, settings.rounds)
    floor = floors(b, t, r, backward, settings.top)
    row = {"rank": r, "batch": b, "tokens": t, "times": times, "left_out": left_out | without, "floors": floor}
    if OURS in times:
        row["roofline"] = max(floor.values()) / times[OURS]["ms"]["median"]
    say(_line(f"{'forward + backward' if backward else 'forward'} R={r} ({b}, {t})", row))
    return row


def _require_agreement(values: dict[str, Any]) -> None:
    with torch.no_grad():
        apart = distance(ops.scan(**values, impl="triton").y, ops.scan(**values, impl="chunked").y)
    if not apart <= AGREE:
        shape = tuple(values["x_bthp"].shape)
        raise ValueError(f"at {shape} the kernels' y and the PyTorch path's lie {apart:.1e} apart; nothing is timed.")


def _line(title: str, row: dict[str, Any]) -> str:
    each = (f"{name} {v['ms']['median']:.3f} ms, host {v['host_ms']:.2f}, {v['peak_GiB']:.2f} GiB" for name, v in
            row["times"].items())  # fmt: skip
    share = f"; {row['roofline']:.0%} of the roofline" if "roofline" in row else ""
    return f"{title}: {'; '.join(each)}{share}; left out: {row['left_out'] or 'none'}"


def layer_of(r: int) -> Mamba3:
    """The 1.5B model's."""
    return Mamba3(D_MODEL, d_state=STATE, headdim=HEADDIM, mimo_rank=r, device="cuda", dtype=torch.bfloat16)


@torch.no_grad()
def steps(layer: Mamba3, b: int, kept: str) -> tuple[dict[str, Callable[[], object]], int]:
    """One step of a layer, projections included, and its kernel alone, with S in the dtype `kept`; and the bytes of S."""
    state = State(*(torch.randn_like(v) for v in layer.init_state(b)[:4]))
    state = state._replace(S=state.S.to(getattr(torch, kept)))
    weight = layer.in_proj.weight
    u = torch.randn(b, weight.shape[1], device=weight.device, dtype=weight.dtype)
    row = layer.in_proj(u)
    step, kernel = torch.no_grad()(layer.step), torch.no_grad()(layer._decode)
    return {"layer": lambda: step(u, state), "kernel": lambda: kernel(row, state)}, state.S.nbytes


@torch.no_grad()
def decode(settings: Settings, say: Say) -> Iterator[dict[str, Any]]:
    """`steps` as CUDA graphs of many: a row for each rank, batch and dtype of the state."""
    for r in settings.shapes:
        layer = layer_of(r)
        weights = layer.in_proj.weight.nbytes + layer.out_proj.weight.nbytes
        for b in settings.batches:
            for kept in STATES:
                each, held = steps(layer, b, kept)
                graphs = {name: Contestant(graphed(run, STEPS)) for name, run in each.items()}
                seen, _ = race(graphs, "layer", settings.rounds)
                times = {name: {k: ms / STEPS for k, ms in v["ms"].items()} for name, v in seen.items()}
                moved = {"layer": 2 * held + weights, "kernel": 2 * held}
                floor = {name: v / settings.top["copy_TBs"] / 1e9 for name, v in moved.items()}
                say(f"decode R={r} B={b} {kept}: "
                    + ", ".join(f"{k} {v['median']:.4f} ms (floor {floor[k]:.4f})" for k, v in times.items()))  # fmt: skip
                yield {"rank": r, "batch": b, "state": kept, "times_ms": times, "floors_ms": floor}
                del graphs, each


def profile(b: int, t: int, r: int, backward: bool) -> dict[str, float]:
    """Microseconds of each kernel in one call, the longest first."""
    contestant = ours(b, t, r, backward)
    for _ in range(2):
        contestant.run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            contestant.run()
        torch.cuda.synchronize()
    times = {e.key[:60]: e.self_device_time_total / 3 for e in seen.key_averages() if e.self_device_time_total}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:14])
