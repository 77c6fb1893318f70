"""One training run of runs/compare.py: its name, its progress, and the figures that are read off it."""

import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba3.train import Reporter
from mamba3.train.report import METRICS, read_metrics

WARMUP = 0.1  # the share of the steps of cells that do not say


@dataclass(frozen=True)
class Cell:
    """One training run."""

    kind: str
    rate: float
    seed: int
    tokens: int
    final: bool
    batch_tokens: int = 65_536
    warmup: float = WARMUP

    @property
    def name(self) -> str:
        length = f"{self.tokens / 1e6:g}M.b{self.batch_tokens}"
        length += "" if self.warmup == WARMUP else f".w{self.warmup:g}"
        return f"{self.kind}.{'final' if self.final else 'sweep'}.{length}.lr{self.rate:g}.s{self.seed}"


class Line(Reporter):
    """A line of progress on stderr every ten seconds."""

    def __init__(self, name: str):
        self.name, self.told, self.loss = name, time.monotonic(), math.nan

    def note(self, message: str) -> None:
        sys.stderr.write(f"{self.name}: {message}\n")

    def started(self, step: int, steps: int) -> None:
        self.steps = steps
        sys.stderr.write(f"{self.name}: from step {step} of {steps}\n")

    def stepped(self, report: Any) -> None:
        if report.skipped:
            sys.stderr.write(f"{self.name}: step {report.step} not taken: {report.skipped}\n")
        if time.monotonic() - self.told > 10 or report.step == self.steps:
            self.told, speed = time.monotonic(), report.tokens / report.seconds
            sys.stderr.write(f"{self.name}: step {report.step}, loss {report.loss:.4f}, {speed:,.0f} tokens/s\n")


def speed(folder: Path) -> dict[str, Any]:
    """Median tokens/s of the steps after the first ten, which compile, and how many were not taken."""
    steps = [line for line in read_metrics(folder / METRICS) if line["kind"] == "step"]
    timed = steps[10:] or steps
    rate = statistics.median(line["tokens"] / line["seconds"] for line in timed)
    return {"tokens_per_second": rate, "train_loss": steps[-1]["loss"], "skipped": steps[-1]["skips"]}


def curve(folder: Path, points: int = 60) -> list[list[float]]:
    """(step, mean training loss up to it since the point before), about so many points."""
    steps = [line for line in read_metrics(folder / METRICS) if line["kind"] == "step"]
    width = max(1, len(steps) // points)
    parts = [steps[first : first + width] for first in range(0, len(steps), width)]
    return [[part[-1]["step"], round(statistics.fmean(line["loss"] for line in part), 4)] for part in parts]


def spread_of(values: list[float]) -> dict[str, float | None]:
    """Mean, and the standard deviation over seeds where there is more than one."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
