"""From continuous coefficients to those of the recurrence (Table 1; mathematics.md, sections 1 and 3).

    alpha_t = exp(A_t dt_t)        gamma_t = lam_t dt_t        beta_t = halo_t alpha_t,  halo_t = (1 - lam_t) dt_t

The halo is what token t adds, through the trapezoid, to the weight of token t - 1: the recurrence is Euler's with
S_{t-1} replaced by S_{t-1} + halo_t sum_r x_{t-1,r} (x) B_{t-1,r}. lam = 1 is exponential Euler, lam = 1/2 the trapezoid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Coefficients(NamedTuple):
    """log_alpha, halo, gamma: [..., h] each, in the dtype of dt."""

    log_alpha: Tensor
    halo: Tensor
    gamma: Tensor


def discretize(dt: Tensor, A: Tensor, lam: Tensor) -> Coefficients:
    """dt > 0, A < 0 and lam in [0, 1], each [..., h], to the coefficients of the recurrence."""
    return Coefficients(log_alpha=A * dt, halo=(1 - lam) * dt, gamma=lam * dt)


def heavy_tail(v: Tensor) -> Tensor:
    """1 + v for v >= 0 and 1 / (1 - v) below: positive and continuously differentiable."""
    return v.clamp(min=0) + 1 / (1 - v.clamp(max=0))


DECAYS = {"heavy_tail": heavy_tail, "softplus": F.softplus}


def decay_rate(A_raw: Tensor, decay: str, floor: float) -> Tensor:
    """A = -max(f(A_raw), floor) with f = `DECAYS[decay]`: always negative, so that the state never grows."""
    return -torch.clamp(DECAYS[decay](A_raw), min=floor)
