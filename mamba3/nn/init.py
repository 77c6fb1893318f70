"""Initial values (mathematics.md, section 7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def softplus_inverse(v: Tensor) -> Tensor:
    """v = softplus(result), stable for small v."""
    return v + torch.log(-torch.expm1(-v))


def dt_bias_(bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """softplus^-1 of step sizes drawn log-uniformly from [dt_min, dt_max], at least `floor`."""
    log_dt = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
    bias.copy_(softplus_inverse(log_dt.exp().clamp(min=floor)))


def bias_(bias: Tensor, value: float | tuple[float, float]) -> None:
    """A constant, or uniform in (low, high)."""
    if isinstance(value, tuple):
        bias.uniform_(*value)
    else:
        bias.fill_(value)


def residual_(linear: nn.Linear, residuals: int) -> None:
    """PyTorch's default for a linear layer, divided by sqrt(number of residual additions in the model)."""
    linear.reset_parameters()
    with torch.no_grad():
        linear.weight.div_(math.sqrt(residuals))
