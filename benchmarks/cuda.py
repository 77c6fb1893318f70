"""Times on a CUDA device of contestants that take turns, their memory, and what the device itself can do.

Before each timed call the device is given other work, so that the call's kernels stand in the queue before it comes to them:
the time between the two events is the device's alone. What the launches take the host is reported apart (`host_ms`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

ROUNDS = 9


class Contestant(NamedTuple):
    """What to call, and the bytes of its inputs, which count towards its peak memory."""

    run: Callable[[], object]
    held: int = 0


class Device:
    """Other work for the device: filling `blanket`, which also takes the contestants' data out of the cache."""

    def __init__(self) -> None:
        self.blanket = torch.empty(2**28, device="cuda")
        self.fill_ms = 1.0
        self.fill_ms = statistics.median(self.milliseconds(lambda: self.blanket.zero_(), 4.0) for _ in range(5))

    def milliseconds(self, run: Callable[[], object], host_ms: float) -> float:
        """Device time of one call, which takes the host `host_ms` to launch."""
        for _ in range(1 + round(1.5 * host_ms / self.fill_ms)):
            self.blanket.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quarter points."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return {"median": middle, "low": low, "high": high}


def race(
    contestants: Mapping[str, Contestant], ours: str, rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Device time, host time and peak memory by contestant, and why others were left out.

    In every round each runs once, and the order turns from round to round. `ratio` is its time over that of `ours` in the
    same round.
    """
    device, seen, left_out = Device(), {}, {}
    for name, contestant in contestants.items():
        try:
            seen[name] = _alone(contestant)
        except torch.OutOfMemoryError:
            left_out[name] = "the device's memory does not suffice"
            torch.cuda.empty_cache()
    taken: dict[str, list[float]] = {name: [] for name in seen}
    for i in range(rounds):
        names = list(seen)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken[name].append(device.milliseconds(contestants[name].run, seen[name]["host_ms"]))
    for name, samples in taken.items():
        seen[name]["ms"] = spread(samples)
        if name != ours and ours in taken:
            seen[name]["ratio"] = spread([a / b for a, b in zip(samples, taken[ours], strict=True)])
    return seen, left_out


def _alone(contestant: Contestant) -> dict[str, Any]:
    """Host time and peak memory, once warm."""
    contestant.run()
    torch.cuda.synchronize()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        contestant.run()
        times.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before + contestant.held
    return {"host_ms": statistics.median(times), "peak_GiB": peak / 2**30}


def ceilings() -> dict[str, float]:
    """Copy rate in TB/s, bytes read plus bytes written, and bf16 matrix rate in TFLOP/s."""
    a, m = torch.randn(2**28, device="cuda"), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    times, _ = race({"copy": Contestant(lambda: b.copy_(a)), "matmul": Contestant(lambda: m @ m)}, "copy", ROUNDS)
    return {
        "copy_TBs": 2 * a.nbytes / times["copy"]["ms"]["median"] / 1e9,
        "matmul_TFLOPs": 2 * 8192**3 / times["matmul"]["ms"]["median"] / 1e9,
    }


def graphed(run: Callable[[], object], repeats: int = 1) -> Callable[[], object]:
    """`repeats` calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    return graph.replay
