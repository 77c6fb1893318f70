"""Steps that would spoil a model: a loss or gradient that is not a number, a loss far above the ones before.

A step is a spike if its loss exceeds mean + spike · max(standard deviation, 1 % of the mean) of the last accepted losses.
What is judged is the mean over all ranks, so that all of them judge alike.
"""

import math
from collections import deque

import torch

WINDOW, FEWEST = 64, 16  # losses remembered; with fewer than this nothing is called a spike


class Watch:
    """Judges steps and counts what it refused; part of a checkpoint, since it decides steps to come."""

    def __init__(self, spike: float):
        self.spike = spike
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.not_finite = self.spikes = self.in_a_row = 0

    @property
    def skipped(self) -> int:
        """Steps refused so far."""
        return self.not_finite + self.spikes

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step with this loss and gradient norm must not be taken; None where it may."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.not_finite += 1
            self.in_a_row += 1
            what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
            return f"the {what} is {value}"
        limit = self._limit()
        if loss > limit:
            self.spikes += 1
            self.in_a_row += 1
            return f"the loss is {loss:.3f}, a spike: above {limit:.3f}"
        self.in_a_row = 0
        self.losses.append(loss)
        return None

    def _limit(self) -> float:
        if not self.spike or len(self.losses) < FEWEST:
            return math.inf
        mean = math.fsum(self.losses) / len(self.losses)
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.losses) / len(self.losses))
        return mean + self.spike * max(deviation, 0.01 * mean)

    def tensor(self) -> torch.Tensor:
        """Everything remembered, as a checkpoint holds it: [3 + WINDOW], NaN where no loss is."""
        losses = [*self.losses, *[math.nan] * (WINDOW - len(self.losses))]
        return torch.tensor([self.not_finite, self.spikes, self.in_a_row, *losses], dtype=torch.float64)

    def restore(self, values: torch.Tensor) -> None:
        """The inverse of `tensor`."""
        self.not_finite, self.spikes, self.in_a_row, *losses = values.tolist()
        self.not_finite, self.spikes, self.in_a_row = int(self.not_finite), int(self.spikes), int(self.in_a_row)
        self.losses = deque((loss for loss in losses if not math.isnan(loss)), maxlen=WINDOW)
