"""Times of contestants that answer the same question, taken in turns.

`race` runs each contestant once, which warms it up, hands what they returned to the check, and only then takes times:
in every round each contestant runs once, and the order turns from round to round, so that a machine that slows down slows
all of them. A ratio is formed within each round; its median and range are what is reported.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.checks import Check, Refused, require


class Spread(NamedTuple):
    """A number measured in every round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """Median, least and greatest of the rounds, and their quartiles where there are at least four."""
        values = {"median": self.median, "min": min(self.rounds), "max": max(self.rounds), "rounds": len(self.rounds)}
        if len(self.rounds) >= 4:
            low, _, high = statistics.quantiles(self.rounds, n=4)
            values |= {"quartile_1": low, "quartile_3": high}
        return values


class Race(NamedTuple):
    """seconds of each contestant, and the checks that let them start."""

    seconds: dict[str, Spread]
    checks: tuple[Check, ...]

    def ratio(self, slow: str, fast: str) -> Spread:
        """How many times as long `slow` took as `fast`, round by round."""
        pairs = zip(self.seconds[slow].rounds, self.seconds[fast].rounds, strict=True)
        return Spread(tuple(a / b for a, b in pairs))

    def fastest(self, names: Sequence[str]) -> str:
        """The contestant among `names` with the least median."""
        return min(names, key=lambda name: self.seconds[name].median)


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, the 99th percentile and the largest."""
    if not values:
        raise Refused("nothing was measured; the time was too short")
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    return {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in at.items()}


def race(
    contestants: Mapping[str, Callable[[], Any]],
    check: Callable[[dict[str, Any]], Sequence[Check]],
    rounds: int,
) -> Race:
    """Time the contestants in turns.

    Args:
        contestants: what to call, by name.
        check: from what each contestant returned to the checks that must hold.
        rounds: times each contestant runs after the warm-up.

    Raises Refused when a check fails; nothing was timed then.
    """
    checks = tuple(check({name: run() for name, run in contestants.items()}))
    require(checks)
    names = list(contestants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(_seconds(contestants[name]))
    return Race({name: Spread(tuple(seconds)) for name, seconds in taken.items()}, checks)


def _seconds(run: Callable[[], Any]) -> float:
    gc.disable()
    try:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    finally:
        gc.enable()
