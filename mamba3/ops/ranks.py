"""From what heads share to what each head and rank sees (mathematics.md, section 1).

Bhat_{r,h} = B_{r, g = h // (H/G)} + B_bias_{h,r}        x_{r,h} = x_h * mimo_x_{h,r}        (R = 1 without mimo_x: x)
"""

from __future__ import annotations

from torch import Tensor


def per_head(B: Tensor, bias: Tensor | None, nheads: int) -> Tensor:
    """B [..., r, g, n] and bias [h, r, n] to [..., r, h, n]."""
    *lead, rank, groups, n = B.shape
    B = B.unsqueeze(-2).expand(*lead, rank, groups, nheads // groups, n).reshape(*lead, rank, nheads, n)
    return B if bias is None else B + bias.transpose(0, 1)


def per_rank(x: Tensor, mimo: Tensor | None) -> Tensor:
    """x [..., h, p] and mimo [h, r, p] to [..., r, h, p]; a rank axis of one without mimo."""
    x = x.unsqueeze(-3)
    return x if mimo is None else x * mimo.transpose(0, 1)
