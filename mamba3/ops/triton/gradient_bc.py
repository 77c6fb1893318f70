# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Gradients of B, of C, of their biases and of the angles: what `gradient_rows` says of each head, summed over heads.

    dtheta_t tick_t = sum of dphi from t to the sequence's end

Up to a constant of the sequence, which the caller adds where the last state has a gradient, the sum of dphi past a point is
what the state there sees turn: turning all later B and C by one angle is turning the state back, sum_{s >= c} dphi_s =
-<dS, J S> for S that enters chunk c and the gradient dS of it (`turning`). Within the chunk,

    sum_{s >= t} dphi_s = -<dS, J S> - sum_{c <= s < t} dphi_s
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import rounded_product
from mamba3.ops.triton.tiles import product


@triton.jit
def part_of_rows(
    v, i_row, m_l, first, stop, S: tl.constexpr, WIDTH: tl.constexpr, L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr
):
    """Channels from `first` on, before `stop`, of rows v [l r, S] from row i_row (int64) on: [l, r, WIDTH] in float32."""
    o_l, o_r = tl.arange(0, L)[:, None, None], tl.arange(0, RP)[None, :, None]
    o_n = first + tl.arange(0, WIDTH)[None, None, :]
    p_v = v + i_row * S + ((o_l * R + o_r) * S + o_n)
    return tl.load(p_v, mask=m_l[:, None, None] & (o_r < R) & (o_n < stop), other=0.0).to(tl.float32)


@triton.jit
def rows_of(L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """Which row of [l r] each row of a tile [l rp] is. With ranks and tokens in one dimension tiles are matrices, which
    asynchronous copies lay out without bank conflicts for the product that reads them."""
    o_row = tl.arange(0, L * RP)
    if R == RP:
        return o_row
    else:
        return (o_row // RP) * R + o_row % RP


@triton.jit
def put_bias(
    d_bias, b_v, b_ranks, i_h, i_j, o_n, m_n, WIDTH: tl.constexpr, H: tl.constexpr, N: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Rows [l r, n], summed over tokens, to channels o_n of d_bias [c, h, r, n]: by a product with ones, because a sum across
    threads takes several times as many instructions."""
    b_sum = product(tl.trans(b_v), b_ranks, tl.zeros((WIDTH, b_ranks.shape[1]), tl.float32))  # [n, r]
    o_r = tl.arange(0, b_ranks.shape[1])
    p_bias = d_bias + (i_j.to(tl.int64) * H + i_h) * (R * N) + (o_r[None, :] * N + o_n[:, None])
    tl.store(p_bias, b_sum, mask=(o_r < R)[None, :] & m_n[:, None])


@triton.jit
def sum_of_heads(
    rows, v, v_parts, d_bias, i_j, i_t, i_part, blocks, end, head, count, first, GN: tl.constexpr, H: tl.constexpr,
    N: tl.constexpr, UB: tl.constexpr, L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Channels of B or of C, from `first` on: to v from token i_t on or, as one block of several, to v_parts from i_part on.

    The heads are summed by products with the identity, exact for finite values (one that is not makes its channel NaN in all
    tokens of the chunk): products read a tile where its copy has put it, without bank conflicts, and what reads it any other
    way makes the compiler lay it out for that.
    """
    RANKS: tl.constexpr = RP if RP > 16 else 16
    b_sum = tl.zeros((L * RP, UB), tl.float32)
    o_n, o_row, o_each = first + tl.arange(0, UB), rows_of(L, R, RP), tl.arange(0, L * RP)
    m_v = ((i_t + o_each // RP < end) & (o_each % RP < R))[:, None] & (o_n < N)[None, :]
    b_same = tl.where(o_each[:, None] == o_each[None, :], 1.0, 0.0).to(DTYPE)
    b_ranks = tl.where((o_each % RP)[:, None] == tl.arange(0, RANKS)[None, :], 1.0, 0.0).to(DTYPE)
    for i in tl.range(0, count, num_stages=STAGES):
        i_own = (i_j.to(tl.int64) * H + head + i) * (L * R)
        b_v = tl.load(rows + i_own * N + (o_row[:, None] * N + o_n[None, :]), mask=m_v, other=0.0)
        if EXACT:
            b_sum += b_v
        else:
            b_sum = product(b_same, b_v, b_sum)
        if HAS_BIAS:
            put_bias(d_bias, b_v, b_ranks, head + i, i_j, o_n, o_n < N, UB, H, N, R)
    o_v = o_row[:, None] * GN + o_n[None, :]
    if blocks == 1:
        tl.store(v + i_t.to(tl.int64) * R * GN + o_v, b_sum.to(v.dtype.element_ty), mask=m_v)
    else:
        tl.store(v_parts + i_part * R * GN + o_v, b_sum.to(v_parts.dtype.element_ty), mask=m_v)


@triton.jit
def earlier_sums(b_v, L: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """[l, a] summed over the tokens of the chunk before l."""
    o_l = tl.arange(0, L)
    b_before = tl.where(o_l[:, None] > o_l[None, :], 1.0, 0.0)
    b_zero = tl.zeros((L, WIDTH), tl.float32)
    if EXACT:
        return product(b_before, b_v, b_zero)
    else:
        high = b_v.to(tl.bfloat16)
        low = (b_v - high.to(tl.float32)).to(tl.bfloat16)
        return product(b_before.to(tl.bfloat16), low, product(b_before.to(tl.bfloat16), high, b_zero))


@triton.jit
def sum_of_angles(
    rows, turning, theta, tick, d_theta, d_tick, i_c, i_j, i_t, i_row, m_l, head, count, T, H: tl.constexpr,
    A: tl.constexpr, W: tl.constexpr, L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, LEAVING: tl.constexpr,
    EXACT: tl.constexpr, HARDWARE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """d_theta [t, a] of these heads, and d_tick [h, t]."""
    o_token, o_a = tl.arange(0, L), tl.arange(0, W)
    b_dtheta = tl.zeros((L, W), tl.float32)
    m_theta = m_l[:, None] & (o_a < A)[None, :]
    b_theta = tl.load(theta + i_t.to(tl.int64) * A + (o_token[:, None] * A + o_a[None, :]), mask=m_theta, other=0.0)
    for i in tl.range(0, count, num_stages=STAGES):
        i_h = head + i
        b_dphi = part_of_rows(rows, (i_j.to(tl.int64) * H + i_h) * (L * R), m_l, 0, A, A, W, L, R, RP)
        b_dphi = tl.sum(b_dphi, axis=1)  # [l, a]
        p_turning = turning + (i_c.to(tl.int64) * H + i_h) * A + o_a
        b_turning = tl.load(p_turning, mask=o_a < A, other=0.0)
        b_later = -b_turning[None, :] - earlier_sums(b_dphi, L, W, EXACT)
        if LEAVING:
            tl.store(p_turning, b_turning + tl.sum(b_dphi, axis=0), mask=o_a < A)
        b_tick = tl.load(tick + (i_t.to(tl.int64) + o_token) * H + i_h, mask=m_l, other=0.0)
        b_dtheta += b_later * b_tick[:, None]
        p_tick = d_tick + i_h.to(tl.int64) * T + i_t + o_token
        tl.store(p_tick, tl.sum(rounded_product(b_later, b_theta, HARDWARE), axis=1), mask=m_l)
    tl.store(d_theta + i_row * A + (o_token[:, None] * A + o_a[None, :]), b_dtheta, mask=m_theta)


# How many heads a program sums, and so where the sums go, depends on how many chunks there are: values, so that a new length
# needs no compilation of its own.
@triton.jit(do_not_specialize=["c_first", "t_first", "Tw", "heads"])
def gradient_bc_kernel(
    theta, tick, dB_rows, dC_rows, dphi_rows, turning, chunks, dB, dC, dB_parts, dC_parts, d_theta, d_tick, dB_bias,
    dC_bias, c_first, t_first, Tw, heads, T,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, A: tl.constexpr,
    W: tl.constexpr, UB: tl.constexpr, L: tl.constexpr, HAS_BIAS_B: tl.constexpr,
    HAS_BIAS_C: tl.constexpr, LEAVING: tl.constexpr, EXACT: tl.constexpr, HARDWARE: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (block of `heads` heads of a group, chunk of the piece, part): the angles, which take longest and so begin
    first; then UB channels each of C, then of B.

    Rows and turning of `gradient_rows_kernel`; LEAVING makes turning that of the state the chunk leaves. Sums: dB, dC [t r, g,
    n] or, where a group has several blocks, dB_parts, dC_parts [block, t r, g, n] of Tw tokens from t_first on; of these too
    d_theta [g block, t, a]; biases [c - c_first, h, r, n]; d_tick [h, t].
    """
    i_all, i_j, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    PARTS: tl.constexpr = (N + UB - 1) // UB
    blocks = tl.cdiv(H // G, heads)
    i_g, i_b = i_all // blocks, i_all % blocks
    i_c = c_first + i_j
    i_t, end = tl.load(chunks + i_c * 5), tl.load(chunks + i_c * 5 + 1)
    m_l = i_t + tl.arange(0, L) < end
    i_own = i_b.to(tl.int64) * Tw + (i_t - t_first)
    head, count = i_g * (H // G) + i_b * heads, tl.minimum(heads, H // G - i_b * heads)
    ANGLES: tl.constexpr = 1 if A > 0 else 0
    i_part -= ANGLES
    if i_part < 0:
        if A > 0:
            sum_of_angles(
                dphi_rows, turning, theta, tick, d_theta, d_tick, i_c, i_j, i_t, i_all.to(tl.int64) * Tw + (i_t - t_first),
                m_l, head, count, T, H, A, W, L, R, RP, LEAVING, EXACT, HARDWARE, STAGES,
            )  # fmt: skip
    elif i_part >= PARTS:
        sum_of_heads(
            dB_rows, dB + i_g * N, dB_parts + i_g * N, dB_bias, i_j, i_t, i_own, blocks, end, head, count,
            (i_part - PARTS) * UB, G * N, H, N, UB, L, R, RP, HAS_BIAS_B, EXACT, STAGES, DTYPE,
        )  # fmt: skip
    else:
        sum_of_heads(
            dC_rows, dC + i_g * N, dC_parts + i_g * N, dC_bias, i_j, i_t, i_own, blocks, end, head, count, i_part * UB,
            G * N, H, N, UB, L, R, RP, HAS_BIAS_C, EXACT, STAGES, DTYPE,
        )  # fmt: skip
