"""What must hold before a time may be printed.

A check is an error and the bound it must not exceed; NaN never holds. A benchmark whose checks fail is refused: it reports
which, and no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.ops import State

# How far two correct orders of the same work may lie apart, as a relative error of the whole tensor. Sound runs differ by
# some unit roundoffs (6e-8, 4e-3); a missing term of the recurrence or a wrong angle shows as 1e-1 and more.
AGREE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2}


class Refused(Exception):
    """A check failed, so nothing was timed. The text says which, by how much, and what was allowed."""


class Check(NamedTuple):
    """A law, the error found, and the error allowed."""

    law: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.law}: error {self.error:.2e}, allowed {self.bound:.0e}"


def require(checks: Sequence[Check]) -> None:
    """Refused unless there are checks and all of them hold."""
    if not checks:
        raise Refused("nothing was checked")
    failed = [str(check) for check in checks if not check.holds]
    if failed:
        raise Refused("; ".join(failed))


def distance(ours: Tensor, truth: Tensor) -> float:
    """Relative error of the whole tensor, |ours - truth| / |truth|; the plain error where the truth is zero."""
    ours, truth = ours.detach().double(), truth.detach().double()
    error, size = float((ours - truth).norm()), float(truth.norm())
    return error / size if size > 0 else error


def angle_distance(ours: Tensor, truth: Tensor) -> float:
    """The largest difference of two angles on the circle, in radians."""
    difference = ours.detach().double() - truth.detach().double()
    return float(torch.atan2(difference.sin(), difference.cos()).abs().max()) if difference.numel() else 0.0


def agree(law: str, ours: Tensor, truth: Tensor, dtype: torch.dtype) -> Check:
    """The check that two results computed in `dtype` agree."""
    return Check(law, distance(ours, truth), AGREE[dtype])


def states_agree(law: str, ours: State, truth: State, dtype: torch.dtype) -> Check:
    """The check that two states agree: the angle on the circle, the other tensors relatively; the worst counts."""
    errors = [distance(o, t) for o, t in zip(ours[1:4], truth[1:4], strict=True)]
    return Check(law, max(angle_distance(ours.phi, truth.phi), *errors), AGREE[dtype])
