"""Decay factors of chunks: decay(s -> t) = exp(sum_{s < i <= t} A_i dt_i).

Exponents are sums along the chunk in float64, rounded only once they are differences: the decay between two neighbours
stays exact however much was forgotten before them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from mamba3.ops.rotate import phase_dtype


class Decays(NamedTuple):
    """Of every chunk: sums [k, h, l], the running log-decay in float64; w and gamma [k, h, l]; into [k, h, l], the decay
    from the chunk's start; out [k, h, l], that to its end, times w; total [k, h]."""

    sums: Tensor
    w: Tensor
    gamma: Tensor
    into: Tensor
    out: Tensor
    total: Tensor


def decays(log_alpha: Tensor, w: Tensor, gamma: Tensor) -> Decays:
    """Decay factors from [k, l, h] coefficients."""
    dtype, device = log_alpha.dtype, log_alpha.device
    sums = log_alpha.transpose(1, 2).to(phase_dtype(device)).cumsum(2)
    w, gamma, last = w.transpose(1, 2).contiguous(), gamma.transpose(1, 2), sums[..., -1:]
    out = (last - sums).to(dtype).exp() * w
    return Decays(sums, w, gamma, sums.to(dtype).exp(), out, last.squeeze(-1).exp().to(dtype))


def _before(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """decay(s -> l) for s < l, one elsewhere (so that nothing overflows)."""
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(dtype).tril_(-1).exp_()


class Between(Function):
    """[k, h, l, s]: decay(s -> l) w_s for s < l, gamma on the diagonal, zero above. Its gradient is two sums of a product."""

    @staticmethod
    def forward(ctx, sums: Tensor, w: Tensor, gamma: Tensor) -> Tensor:
        factors = _before(sums, w.dtype)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(sums, w, factors)
            factors = factors * w.unsqueeze(-2)
        else:
            factors.mul_(w.unsqueeze(-2))
        factors.tril_(-1)
        if torch.compiler.is_exporting():  # torch.export (2.13) does not know how to write into a diagonal
            return factors + torch.diag_embed(gamma)
        factors.diagonal(dim1=-2, dim2=-1).add_(gamma)
        return factors

    @staticmethod
    def backward(ctx, grad: Tensor):
        sums, w, factors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: the saved factors have none
            factors = _before(sums, w.dtype)
        product = (grad * factors).tril(-1)
        grad_w = product.sum(-2)
        grad_sums = (product @ w.unsqueeze(-1)).squeeze(-1) - grad_w * w
        return grad_sums.to(sums.dtype), grad_w, grad.diagonal(dim1=-2, dim2=-1)
