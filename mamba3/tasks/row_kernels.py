# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""What training does row by row or weight by weight, each pass over memory as one Triton kernel.

    Normed: u = h / rms(h), and h itself, so that the gradient of the residual stream is added where the norm's is made
    adam_step: clip, AdamW and the weights of `Captured`, each model with its own rate

Float32 in and out. Laws: PyTorch's norm and its gradient; `Captured` without kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from mamba3.ops.triton.assembler import sound_assembler

ROWS = 64  # of a program
WEIGHTS = 1024  # of a program


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(h, u, rows, EPS: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, L: tl.constexpr):
    """h, u [rows, c]."""
    row, o_c = (tl.program_id(0) * L + tl.arange(0, L)).to(tl.int64), tl.arange(0, CP)
    mask, p = (row < rows)[:, None] & (o_c < C)[None, :], row[:, None] * C + o_c[None, :]
    b_h = tl.load(h + p, mask=mask, other=0.0)
    tl.store(u + p, b_h * tl.rsqrt(tl.sum(b_h * b_h, axis=1) / C + EPS)[:, None], mask=mask)


@triton.jit(do_not_specialize=["rows"])
def norm_back_kernel(h, du, dres, dh, rows, EPS: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, L: tl.constexpr):
    """dh = dres + the gradient of h through u."""
    row, o_c = (tl.program_id(0) * L + tl.arange(0, L)).to(tl.int64), tl.arange(0, CP)
    mask, p = (row < rows)[:, None] & (o_c < C)[None, :], row[:, None] * C + o_c[None, :]
    b_h, b_du = tl.load(h + p, mask=mask, other=0.0), tl.load(du + p, mask=mask, other=0.0)
    inverse = tl.rsqrt(tl.sum(b_h * b_h, axis=1) / C + EPS)[:, None]
    b_u = b_h * inverse
    own = inverse * (b_du - b_u * (tl.sum(b_du * b_u, axis=1) / C)[:, None])
    tl.store(dh + p, own + tl.load(dres + p, mask=mask, other=0.0), mask=mask)


class Normed(Function):
    """(h / rms(h), h) of h [..., c]."""

    @staticmethod
    def forward(ctx, h: Tensor, eps: float):
        h = h.contiguous()
        u, c = torch.empty_like(h), h.shape[-1]
        ctx.rows = h.numel() // c
        ctx.constants = dict(EPS=eps, C=c, CP=triton.next_power_of_2(c), L=ROWS, num_warps=4)
        with sound_assembler(h.device):
            norm_kernel[(triton.cdiv(ctx.rows, ROWS),)](h, u, ctx.rows, **ctx.constants)
        ctx.save_for_backward(h)
        return u, h.view_as(h)

    @staticmethod
    def backward(ctx, du: Tensor, dres: Tensor):
        (h,) = ctx.saved_tensors
        dh = torch.empty_like(h)
        with sound_assembler(h.device):
            norm_back_kernel[(triton.cdiv(ctx.rows, ROWS),)](
                h, du.contiguous(), dres.contiguous(), dh, ctx.rows, **ctx.constants
            )
        return dh, None


@triton.jit(do_not_specialize=["size"])
def adam_kernel(
    weights, first, second, gradient, exist, decayed, scale, alive, rates, whole, count, size, SLOW: tl.constexpr,
    SLOWER: tl.constexpr, EPS: tl.constexpr, DECAY: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """weights, first, second, gradient, exist [m, size]; decayed [size]; scale, alive [m]; rates [steps, m]; whole
    [steps, 2]; count [1]."""
    i_m, o = tl.program_id(1), tl.program_id(0) * L + tl.arange(0, L)
    mask, p = o < size, i_m.to(tl.int64) * size + o
    live, step = tl.load(alive + i_m) != 0, tl.load(count)
    rate = tl.load(rates + step * tl.num_programs(1) + i_m)
    g = tl.load(gradient + p, mask=mask, other=0.0) * tl.load(scale + i_m) * tl.load(exist + p, mask=mask, other=0.0)
    g = tl.where(live, g, 0.0)
    b_w, b_first = tl.load(weights + p, mask=mask, other=0.0), tl.load(first + p, mask=mask, other=0.0)
    b_second = tl.load(second + p, mask=mask, other=0.0)
    b_first += (g - b_first) * (1.0 - SLOW)
    b_second = b_second * SLOWER + g * g * (1.0 - SLOWER)
    change = b_first / tl.load(whole + 2 * step) / (tl.sqrt(b_second / tl.load(whole + 2 * step + 1)) + EPS)
    change += DECAY * tl.load(decayed + o, mask=mask, other=0.0) * b_w
    tl.store(first + p, b_first, mask=mask)
    tl.store(second + p, b_second, mask=mask)
    tl.store(weights + p, tl.where(live, b_w - change * rate, b_w), mask=mask)


def adam_step(
    weights: Tensor, first: Tensor, second: Tensor, gradient: Tensor, exist: Tensor, decayed: Tensor, scale: Tensor,
    alive: Tensor, rates: Tensor, whole: Tensor, count: Tensor, *, betas: tuple[float, float], eps: float, decay: float,
) -> None:  # fmt: skip
    """One step of AdamW, in place: weights, first, second, gradient, exist [m, size], decayed [size], scale (of clipping) and
    alive [m]; count [1] says which of the rates [steps, m] and of the averages' corrections, whole [steps, 2]."""
    (m, size), (slow, slower) = weights.shape, betas
    with sound_assembler(weights.device):
        adam_kernel[(triton.cdiv(size, WEIGHTS), m)](
            weights, first, second, gradient.contiguous(), exist, decayed, scale, alive, rates, whole, count, size,
            SLOW=slow, SLOWER=slower, EPS=eps, DECAY=decay, L=WEIGHTS, num_warps=4,
        )  # fmt: skip
