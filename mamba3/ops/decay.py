"""Decay factors of chunks: decay(s -> t) = exp(sum_{s < i <= t} A_i dt_i).

Exponents are sums along the chunk in float64, rounded only once they are differences: the decay between two neighbours
stays exact however much was forgotten before them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from mamba3.ops.rotate import leading, phase_dtype


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


def between(sums: Tensor, w: Tensor, gamma: Tensor) -> Tensor:
    """[k, h, l, s]: decay(s -> l) w_s for s < l, gamma on the diagonal, zero above."""
    if torch.is_grad_enabled():
        return Between.apply(sums, w, gamma)[0]
    return _weighted(_before(sums, w.dtype).mul_(w.unsqueeze(-2)), gamma)


def _weighted(factors: Tensor, gamma: Tensor) -> Tensor:
    factors.tril_(-1)
    if torch.compiler.is_exporting():  # torch.export (2.13) does not know how to write into a diagonal
        return factors + torch.diag_embed(gamma)
    factors.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return factors


class Between(Function):
    """(`between`, its factors without w, which are kept for the gradient: two sums of a product)."""

    @staticmethod
    def forward(sums: Tensor, w: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        factors = _before(sums, w.dtype)
        return _weighted(factors * w.unsqueeze(-2), gamma), factors

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    def vmap(info, in_dims: tuple, *inputs: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """torch.vmap: every formula here counts axes from the last, so that one more axis may lead."""
        stacked = [leading(v, dim, info.batch_size) for v, dim in zip(inputs, in_dims, strict=True)]
        return Between.apply(*stacked), (0, 0)

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        sums, w, factors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: the saved factors have none
            factors = _before(sums, w.dtype)
        product = (grad * factors).tril(-1)
        grad_w = product.sum(-2)
        grad_sums = (product @ w.unsqueeze(-1)).squeeze(-1) - grad_w * w
        return grad_sums.to(sums.dtype), grad_w, grad.diagonal(dim1=-2, dim2=-1)
