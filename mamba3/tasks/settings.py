"""How a model of a task is trained and evaluated: the paper's values where it states them, a choice where it does not."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

# Eight rates, evenly spaced in their logarithm between the ends that the paper names.
PAPER_RATES = tuple(round(10 ** (-4 + 2 * i / 7), 10) for i in range(8))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One architecture, trained once for every pair of a rate and a seed."""

    rates: tuple[float, ...] = (1e-3,)  # peak learning rates
    seeds: tuple[int, ...] = (0,)  # of the weights and of the training sequences
    shortest: int = 3  # tokens of the shortest training sequence, its answer included
    stages: tuple[int, ...] = (40, 80, 120, 160)  # the longest, stage by stage; the paper says "40 -> 160"
    steps: int = 10_000  # of each stage; the paper: "each curriculum runs for 10^4 steps"
    batch: int = 256  # sequences of a step

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1  # not on vectors, dt_bias and D
    decay_bc_bias: bool = False  # also on the biases of B and C
    clip: float = 1.0  # gradient norm of each model; 0 for none
    warmup: float = 0.1  # share of all steps in which the rate rises
    last_rate: float = 1e-6  # where the half cosine ends

    ranges: tuple[tuple[int, int], ...] = ((256, 256), (40, 256), (512, 512), (1024, 1024), (4096, 4096))
    sequences: int = 8192  # evaluated in each range that ends at 256 tokens or before
    long_sequences: int = 1024  # in the others
    save_every: int = 500  # steps between checkpoints

    def __post_init__(self):
        for name in ("rates", "seeds", "stages", "ranges", "betas"):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in getattr(self, name))
            object.__setattr__(self, name, value)
            if not value:
                raise ValueError(f"{name} must have at least one entry.")
        for name in ("steps", "batch", "sequences", "long_sequences", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; it is {getattr(self, name)}.")
        if not all(rate > 0 and math.isfinite(rate) for rate in self.rates):
            raise ValueError(f"rates must be positive and finite; they are {self.rates}.")
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"rates and seeds must not repeat; they are {self.rates} and {self.seeds}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps in [0, 1); it is {self.warmup}.")

    @property
    def runs(self) -> tuple[tuple[float, int], ...]:
        """(rate, seed) of each model, seeds together."""
        return tuple((rate, seed) for seed in self.seeds for rate in self.rates)

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return self.steps * len(self.stages)

    def rate(self, step: int, peak: float) -> float:
        """The learning rate of step `step` (0 is the first): a line up to `peak`, then half a cosine to last_rate."""
        warmup = int(self.warmup * self.total)
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(self.total - 1 - warmup, 1)
        return self.last_rate + (peak - self.last_rate) * (1 + math.cos(math.pi * progress)) / 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return dataclasses.asdict(self)
