"""Complex state as data-dependent rotation (Propositions 2 to 4; mathematics.md, section 2).

Channels (i, i + a) for i < a are one complex channel; channels from 2a on are real. A token's B and C are rotated by the
cumulative angle phi_t = sum_{i <= t} theta_i tick_i, so that C_t . B_s carries exp(i (phi_t - phi_s)).
Only phi mod 2 pi matters, and it is kept in [-pi, pi]: precision does not depend on how many tokens went by.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import Function

# 2 pi as a float32 number plus the rest: n * 2 pi is subtracted in two exact-enough parts (Cody and Waite).
TWO_PI_HIGH = 6.28125
TWO_PI_LOW = 2 * math.pi - TWO_PI_HIGH


def wrap(phi: Tensor) -> Tensor:
    """phi in radians, reduced to [-pi, pi]; the gradient is that of the identity."""
    turns = torch.round(phi.detach() / (2 * math.pi))
    return (phi - turns * TWO_PI_HIGH) - turns * TWO_PI_LOW


def rotate_pairs(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """v [..., n] rotated by the angle of cos, sin [..., a] (broadcast), with 2a <= n."""
    a = cos.shape[-1]
    first, second, real = v.split([a, a, v.shape[-1] - 2 * a], dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat([*turned, real], dim=-1)


def rotate_rows_(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """v [..., n, m] with the angle of cos, sin [..., a, m], in place: for where no gradient is recorded."""
    a = cos.shape[-2]
    first, second = v[..., :a, :], v[..., a : 2 * a, :]
    turned = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    return v


def phase_dtype(device: torch.device) -> torch.dtype:
    """Sums that run along the whole sequence are float64, where the device has it (Apple's does not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def leading(v: Tensor, dim: int | None, size: int = 1) -> Tensor:
    """v with the axis that torch.vmap maps over in front; where it has none, one of `size`."""
    return v.expand(size, *v.shape) if dim is None else v.movedim(dim, 0)


class BiasedRotation(Function):
    """v + bias [q, k, h, n, m] turned by angle [k, h, a, m], from v (broadcast over h) and bias [q, 1, h, n, 1 or m].

    n comes before m = (l r), so that each operation on pairs runs over whole rows of memory. In place where the plain
    formula makes six tensors; its gradient turns back by -angle.
    """

    @staticmethod
    def forward(v: Tensor, bias: Tensor | None, angle: Tensor) -> Tensor:
        rows = v.clone(memory_format=torch.contiguous_format) if bias is None else v + bias
        return rotate_rows_(rows.contiguous(), angle.cos(), angle.sin())

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, bias, angle = inputs
        ctx.save_for_backward(output, angle)
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    def vmap(info, in_dims: tuple, v: Tensor, bias: Tensor | None, angle: Tensor) -> tuple[Tensor, int]:
        """torch.vmap: every formula here counts axes from the last, so that one more axis may lead."""
        v, bias = leading(v, in_dims[0], info.batch_size), None if bias is None else leading(bias, in_dims[1])
        angle = leading(angle, in_dims[2])
        return BiasedRotation.apply(v, bias, angle.reshape(angle.shape[0], 1, *angle.shape[1:])), 0

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, angle = ctx.saved_tensors
        a = angle.shape[-2]
        turned_back = BiasedRotation.apply(grad, None, -angle)
        first, second = slice(0, a), slice(a, 2 * a)
        grad_angle = grad[..., second, :] * rows[..., first, :] - grad[..., first, :] * rows[..., second, :]
        grad_bias = None if ctx.bias_shape is None else turned_back.sum_to_size(ctx.bias_shape)
        return turned_back, grad_bias, grad_angle.sum_to_size(angle.shape)
