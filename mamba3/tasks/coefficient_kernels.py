# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""`mixing.coefficients` as one Triton kernel and its gradient as another, where PyTorch launches some eighty small ones.

    dt = softplus(raw + bias),  A = -max(f(raw), floor),  lam = sigmoid(raw) or fixed;   log_alpha = A dt,  gamma = lam dt,
    w_t = gamma_t + (1 - lam_{t+1}) dt_{t+1} within a sequence,  tick = dt or 0,  theta = pi tanh(raw)

Laws: the results and the gradients of `mixing.coefficients`, to float32's rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from mamba3.ops.triton.assembler import sound_assembler
from mamba3.ops.triton.decode_token import PI, sigmoid, softplus, tanh

ROWS = 64  # of a program
UNSPECIALIZED = ("rows",)


@triton.jit
def _of_row(p_raw, dt_bias, fixed, lam, heavy, i_m, o_h, mask, FLOOR: tl.constexpr, H: tl.constexpr):
    """raw dt, dt, raw A, -A before the floor, -A, lam [l, h] of rows at p_raw [l]."""
    m_h = o_h < H
    raw_dt = tl.load(p_raw[:, None] + o_h[None, :], mask=mask, other=0.0)
    raw_dt += tl.load(dt_bias + i_m * H + o_h, mask=m_h, other=0.0)[None, :]
    raw_A = tl.load(p_raw[:, None] + H + o_h[None, :], mask=mask, other=0.0)
    raw_lam = tl.load(p_raw[:, None] + 2 * H + o_h[None, :], mask=mask, other=0.0)
    tail = tl.maximum(raw_A, 0.0) + 1.0 / (1.0 - tl.minimum(raw_A, 0.0))
    rate = tl.where(tl.load(heavy + i_m) > 0, tail, softplus(raw_A))
    b_lam = tl.where(tl.load(fixed + i_m) > 0, tl.load(lam + i_m), sigmoid(raw_lam))
    return raw_dt, softplus(raw_dt), raw_A, rate, tl.maximum(rate, FLOOR), b_lam


@triton.jit(do_not_specialize=UNSPECIALIZED)
def coefficients_kernel(
    raw, dt_bias, turns, fixed, lam, heavy, log_alpha, w, gamma, tick, theta, firsts, rows, FLOOR: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """raw [m, rows, 3 h + a] to [m, rows, h] and theta [m, rows, a]; firsts [rows]: 1 where a sequence begins."""
    i_m, o_h, o_a = tl.program_id(1), tl.arange(0, HP), tl.arange(0, AP)
    row = tl.program_id(0) * L + tl.arange(0, L)
    m_row, at = row < rows, i_m.to(tl.int64) * rows + row
    WIDTH: tl.constexpr = 3 * H + A
    mask, p_h = m_row[:, None] & (o_h < H)[None, :], at[:, None] * H + o_h[None, :]
    _, dt, _, _, rate, b_lam = _of_row(raw + at * WIDTH, dt_bias, fixed, lam, heavy, i_m, o_h, mask, FLOOR, H)
    follows = tl.load(firsts + row + 1, mask=row + 1 < rows, other=1) == 0
    follows = mask & follows[:, None]
    _, dt_next, _, _, _, lam_next = _of_row(
        raw + (at + 1) * WIDTH, dt_bias, fixed, lam, heavy, i_m, o_h, follows, FLOOR, H
    )
    tl.store(log_alpha + p_h, -rate * dt, mask=mask)
    tl.store(gamma + p_h, b_lam * dt, mask=mask)
    tl.store(w + p_h, b_lam * dt + tl.where(follows, (1.0 - lam_next) * dt_next, 0.0), mask=mask)
    tl.store(tick + p_h, dt * tl.load(turns + i_m), mask=mask)
    m_a = m_row[:, None] & (o_a < A)[None, :]
    b_theta = tl.load(raw + at[:, None] * WIDTH + 3 * H + o_a[None, :], mask=m_a, other=0.0)
    tl.store(theta + at[:, None] * A + o_a[None, :], tanh(b_theta) * PI, mask=m_a)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def coefficients_back_kernel(
    raw, dt_bias, turns, fixed, lam, heavy, dlog_alpha, dw, dgamma, dtick, dtheta, draw, parts, firsts, rows,
    FLOOR: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """draw [m, rows, 3 h + a]; parts [m, programs, h] of the gradient of dt_bias."""
    i_m, o_h, o_a = tl.program_id(1), tl.arange(0, HP), tl.arange(0, AP)
    row = tl.program_id(0) * L + tl.arange(0, L)
    m_row, at = row < rows, i_m.to(tl.int64) * rows + row
    WIDTH: tl.constexpr = 3 * H + A
    m_h = o_h < H
    mask, p_h = m_row[:, None] & m_h[None, :], at[:, None] * H + o_h[None, :]
    raw_dt, dt, raw_A, before, rate, b_lam = _of_row(
        raw + at * WIDTH, dt_bias, fixed, lam, heavy, i_m, o_h, mask, FLOOR, H
    )
    d_log = tl.load(dlog_alpha + p_h, mask=mask, other=0.0)
    d_gamma = tl.load(dgamma + p_h, mask=mask, other=0.0) + tl.load(dw + p_h, mask=mask, other=0.0)
    later = tl.load(firsts + row, mask=m_row, other=1) == 0
    d_halo = tl.load(dw + p_h - H, mask=mask & later[:, None], other=0.0)
    d_dt = -rate * d_log + b_lam * d_gamma + (1.0 - b_lam) * d_halo
    d_dt += tl.load(turns + i_m) * tl.load(dtick + p_h, mask=mask, other=0.0)
    d_dt = tl.where(mask, d_dt * sigmoid(raw_dt), 0.0)
    lower = 1.0 / (1.0 - tl.minimum(raw_A, 0.0))
    slope = tl.where(tl.load(heavy + i_m) > 0, tl.where(raw_A < 0, lower * lower, 1.0), sigmoid(raw_A))
    d_A = tl.where(before >= FLOOR, -dt * d_log * slope, 0.0)
    d_lam = tl.where(tl.load(fixed + i_m) > 0, 0.0, dt * (d_gamma - d_halo) * b_lam * (1.0 - b_lam))
    p_raw = at[:, None] * WIDTH + o_h[None, :]
    tl.store(draw + p_raw, d_dt, mask=mask)
    tl.store(draw + p_raw + H, d_A, mask=mask)
    tl.store(draw + p_raw + 2 * H, d_lam, mask=mask)
    tl.store(parts + (i_m * tl.num_programs(0) + tl.program_id(0)) * H + o_h, tl.sum(d_dt, axis=0), mask=m_h)
    m_a = m_row[:, None] & (o_a < A)[None, :]
    bent = tanh(tl.load(raw + at[:, None] * WIDTH + 3 * H + o_a[None, :], mask=m_a, other=0.0))
    d_theta = tl.load(dtheta + at[:, None] * A + o_a[None, :], mask=m_a, other=0.0) * (1.0 - bent * bent) * PI
    tl.store(draw + at[:, None] * WIDTH + 3 * H + o_a[None, :], d_theta, mask=m_a)


def firsts_of(raw: Tensor) -> Tensor:
    """Which of the rows [m, b, t, ...] begin a sequence, bytes [b, t]."""
    firsts = torch.zeros(raw.shape[1:3], dtype=torch.uint8, device=raw.device)
    firsts[:, 0] = 1
    return firsts


class Coefficients(Function):
    """log_alpha, w, gamma, tick [m, ..., h], theta [m, ..., a] of raw [m, ..., 3 h + a], dt_bias [m, h] and the switches turns,
    fixed, lam, heavy [m]; floor: the least -A; firsts [...] of bytes: 1 where a sequence begins."""

    @staticmethod
    def forward(
        ctx, raw: Tensor, dt_bias: Tensor, turns: Tensor, fixed: Tensor, lam: Tensor, heavy: Tensor, floor: float,
        firsts: Tensor,
    ):  # fmt: skip
        raw, dt_bias = raw.contiguous(), dt_bias.contiguous()
        (m, *places, width), h, rows = raw.shape, dt_bias.shape[1], firsts.numel()
        a = width - 3 * h
        out = [raw.new_empty(m, *places, h) for _ in range(4)]
        theta, ctx.sizes = raw.new_empty(m, *places, a), (firsts, rows)
        ctx.constants = dict(
            FLOOR=floor, H=h, HP=triton.next_power_of_2(h), A=a, AP=triton.next_power_of_2(max(1, a)), L=ROWS,
            num_warps=4,
        )  # fmt: skip
        inputs = (raw, dt_bias, turns, fixed, lam, heavy)
        with sound_assembler(raw.device):
            coefficients_kernel[(triton.cdiv(rows, ROWS), m)](*inputs, *out, theta, *ctx.sizes, **ctx.constants)
        ctx.save_for_backward(*inputs)
        return *out, theta

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raw, dt_bias, *switches = ctx.saved_tensors
        programs = triton.cdiv(ctx.sizes[1], ROWS)
        draw, parts = torch.empty_like(raw), raw.new_empty(raw.shape[0], programs, dt_bias.shape[1])
        with sound_assembler(raw.device):
            coefficients_back_kernel[(programs, raw.shape[0])](
                raw, dt_bias, *switches, *(g.contiguous() for g in grads), draw, parts, *ctx.sizes, **ctx.constants
            )
        return draw, parts.sum(1), None, None, None, None, None, None
