# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Gradients of B, of C, of their biases and of the angles, from the rotated rows of each head: turned back, then summed.

    dphi = dv_2 v_1 - dv_1 v_2 of each pair, for v = B and C       dtheta_t tick_t = sum of dphi from t to the sequence's end

Up to a constant of the sequence, which the caller adds where the last state has a gradient, the sum of dphi past a point is
what the state there sees turn: turning all later B and C by one angle is turning the state back, sum_{s >= c} dphi_s =
-<dS, J S> for S that enters chunk c and the gradient dS of it (`turning`). Within the chunk,

    sum_{s >= t} dphi_s = -<dS, J S> - sum_{c <= s < t} dphi_s

Each head's gradient is turned back by its own angle before heads are summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.channels import rotation
from mamba3.ops.triton.tiles import product


@triton.jit
def earlier_sums(b_v, tokens, L: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr):
    """[l, a] summed over the tokens of the chunk before l."""
    o_l = tl.arange(0, L)
    b_before = tl.where(o_l[:, None] > o_l[None, :], 1.0, 0.0)
    b_zero = tl.zeros((L, W), tl.float32)
    if EXACT:
        return product(b_before, b_v, b_zero)
    else:
        high = b_v.to(tl.bfloat16)
        low = (b_v - high.to(tl.float32)).to(tl.bfloat16)
        return product(b_before.to(tl.bfloat16), low, product(b_before.to(tl.bfloat16), high, b_zero))


@triton.jit
def piece_rows(
    v, i_row, m_l, first, n: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr,
):  # fmt: skip
    """n channels from `first` on of rows v [l r, S] from row i_row (int64) on, as [l, r, WIDTH] in float32."""
    o_l, o_r, o_n = tl.arange(0, L)[:, None, None], tl.arange(0, RP)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    p_v = v + i_row * S + first + ((o_l * R + o_r) * S + o_n)
    return tl.load(p_v, mask=m_l[:, None, None] & (o_r < R) & (o_n < n), other=0.0).to(tl.float32)


@triton.jit
def rank_bias(bias, i_h, first, n: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
              RP: tl.constexpr):  # fmt: skip
    """n channels from `first` on of bias [h, r, n], as [1, r, WIDTH]."""
    o_r, o_n = tl.arange(0, RP)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    return tl.load(bias + i_h * (R * N) + first + (o_r * N + o_n), mask=(o_r < R) & (o_n < n), other=0.0)


@triton.jit
def put_bias(part, b_v, i_h, i_j, first, n: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
             R: tl.constexpr, RP: tl.constexpr):  # fmt: skip
    """[l, r, n], summed over tokens, to channels from `first` on of part [c, h, r, n]."""
    o_r, o_n = tl.arange(0, RP), tl.arange(0, WIDTH)
    p_part = part + (i_j.to(tl.int64) * H + i_h) * (R * N) + first + (o_r[:, None] * N + o_n[None, :])
    tl.store(p_part, tl.sum(b_v, axis=0), mask=(o_r < R)[:, None] & (o_n < n)[None, :])


@triton.jit
def put_shared(part, b_v, i_row, m_l, first, n: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
               R: tl.constexpr, RP: tl.constexpr):  # fmt: skip
    """The inverse of `piece_rows`."""
    o_l, o_r, o_n = tl.arange(0, L)[:, None, None], tl.arange(0, RP)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    p_part = part + i_row * S + first + ((o_l * R + o_r) * S + o_n)
    tl.store(p_part, b_v.to(part.dtype.element_ty), mask=m_l[:, None, None] & (o_r < R) & (o_n < n))


@triton.jit
def gradient_bc_kernel(
    theta, tick, B, C, B_bias, C_bias, turn, phase, dB_rows, dC_rows, turning, chunks, dB, dC, d_theta, d_tick, dB_bias,
    dC_bias, c_first, t_first, Tw, T,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, A: tl.constexpr,
    AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS_B: tl.constexpr,
    HAS_BIAS_C: tl.constexpr, EXACT: tl.constexpr, HARDWARE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a (block of HEADS heads of a group, chunk of the window). Rows of `gradient_rows_kernel`.

    Parts, of Tw tokens from t_first on: dB, dC [block, t r, g, n], d_theta [g block, t, a]; biases [c - c_first, h, r, n].
    d_tick [h, t]. turning [c, h, a] comes from `gradient_rows_kernel` and becomes that of the state the chunk leaves.
    """
    i_b, i_j = tl.program_id(0), tl.program_id(1)
    BLOCKS: tl.constexpr = (H // G + HEADS - 1) // HEADS
    i_g, i_b = i_b // BLOCKS, i_b % BLOCKS
    U: tl.constexpr = N - 2 * A
    o_token, o_a = tl.arange(0, L), tl.arange(0, AP)
    i_c = c_first + i_j
    i_t, end = tl.load(chunks + i_c * 5), tl.load(chunks + i_c * 5 + 1)
    m_l = i_t + o_token < end
    i_row = (i_b.to(tl.int64) * Tw + (i_t - t_first)) * R

    b_dB1 = tl.zeros((L, RP, AP), tl.float32)
    b_dB2 = tl.zeros((L, RP, AP), tl.float32)
    b_dC1 = tl.zeros((L, RP, AP), tl.float32)
    b_dC2 = tl.zeros((L, RP, AP), tl.float32)
    b_dB3 = tl.zeros((L, RP, UP), tl.float32)
    b_dC3 = tl.zeros((L, RP, UP), tl.float32)
    b_dtheta = tl.zeros((L, AP), tl.float32)
    if A > 0:
        p_theta = i_t.to(tl.int64) * A + (o_token[:, None] * A + o_a[None, :])
        m_theta = m_l[:, None] & (o_a < A)[None, :]
        b_theta = tl.load(theta + p_theta, mask=m_theta, other=0.0)
        i_shared = i_t.to(tl.int64) * R
        b_B1 = piece_rows(B + i_g * N, i_shared, m_l, 0, A, AP, G * N, L, R, RP)
        b_B2 = piece_rows(B + i_g * N, i_shared, m_l, A, A, AP, G * N, L, R, RP)
        b_C1 = piece_rows(C + i_g * N, i_shared, m_l, 0, A, AP, G * N, L, R, RP)
        b_C2 = piece_rows(C + i_g * N, i_shared, m_l, A, A, AP, G * N, L, R, RP)
    head = i_g * (H // G) + i_b * HEADS
    for i in tl.range(0, tl.minimum(HEADS, H // G - i_b * HEADS), num_stages=STAGES):
        i_h = head + i
        i_own = (i_j.to(tl.int64) * H + i_h) * (L * R)
        if A > 0:
            b_cos, b_sin = rotation(turn, phase, i_h, i_t, end, i_c, T, H, A, AP, L, HARDWARE, False)
            b_v1 = piece_rows(dC_rows, i_own, m_l, 0, A, AP, N, L, R, RP)
            b_v2 = piece_rows(dC_rows, i_own, m_l, A, A, AP, N, L, R, RP)
            b_1, b_2 = b_v1 * b_cos + b_v2 * b_sin, b_v2 * b_cos - b_v1 * b_sin
            b_dC1 += b_1
            b_dC2 += b_2
            b_own1, b_own2 = b_C1, b_C2
            if HAS_BIAS_C:
                b_own1 += rank_bias(C_bias, i_h, 0, A, AP, N, R, RP)
                b_own2 += rank_bias(C_bias, i_h, A, A, AP, N, R, RP)
                put_bias(dC_bias, b_1, i_h, i_j, 0, A, AP, H, N, R, RP)
                put_bias(dC_bias, b_2, i_h, i_j, A, A, AP, H, N, R, RP)
            b_dphi = b_2 * b_own1 - b_1 * b_own2
            b_v1 = piece_rows(dB_rows, i_own, m_l, 0, A, AP, N, L, R, RP)
            b_v2 = piece_rows(dB_rows, i_own, m_l, A, A, AP, N, L, R, RP)
            b_1, b_2 = b_v1 * b_cos + b_v2 * b_sin, b_v2 * b_cos - b_v1 * b_sin
            b_dB1 += b_1
            b_dB2 += b_2
            b_own1, b_own2 = b_B1, b_B2
            if HAS_BIAS_B:
                b_own1 += rank_bias(B_bias, i_h, 0, A, AP, N, R, RP)
                b_own2 += rank_bias(B_bias, i_h, A, A, AP, N, R, RP)
                put_bias(dB_bias, b_1, i_h, i_j, 0, A, AP, H, N, R, RP)
                put_bias(dB_bias, b_2, i_h, i_j, A, A, AP, H, N, R, RP)
            b_dphi = tl.sum(b_dphi + (b_2 * b_own1 - b_1 * b_own2), axis=1)  # [l, a]
            p_turning = turning + (i_c.to(tl.int64) * H + i_h) * A + o_a
            b_turning = tl.load(p_turning, mask=o_a < A, other=0.0)
            b_later = -b_turning[None, :] - earlier_sums(b_dphi, end - i_t, L, AP, EXACT)
            tl.store(p_turning, b_turning + tl.sum(b_dphi, axis=0), mask=o_a < A)
            b_tick = tl.load(tick + (i_t.to(tl.int64) + o_token) * H + i_h, mask=m_l, other=0.0)
            b_dtheta += b_later * b_tick[:, None]
            p_tick = d_tick + i_h.to(tl.int64) * T + i_t + o_token
            tl.store(p_tick, tl.sum(b_later * b_theta, axis=1), mask=m_l)
        if U > 0:
            b_3 = piece_rows(dC_rows, i_own, m_l, 2 * A, U, UP, N, L, R, RP)
            b_dC3 += b_3
            if HAS_BIAS_C:
                put_bias(dC_bias, b_3, i_h, i_j, 2 * A, U, UP, H, N, R, RP)
            b_3 = piece_rows(dB_rows, i_own, m_l, 2 * A, U, UP, N, L, R, RP)
            b_dB3 += b_3
            if HAS_BIAS_B:
                put_bias(dB_bias, b_3, i_h, i_j, 2 * A, U, UP, H, N, R, RP)

    if A > 0:
        put_shared(dB + i_g * N, b_dB1, i_row, m_l, 0, A, AP, G * N, L, R, RP)
        put_shared(dB + i_g * N, b_dB2, i_row, m_l, A, A, AP, G * N, L, R, RP)
        put_shared(dC + i_g * N, b_dC1, i_row, m_l, 0, A, AP, G * N, L, R, RP)
        put_shared(dC + i_g * N, b_dC2, i_row, m_l, A, A, AP, G * N, L, R, RP)
        p_theta = ((i_g * BLOCKS + i_b).to(tl.int64) * Tw + (i_t - t_first)) * A
        p_theta += o_token[:, None] * A + o_a[None, :]
        tl.store(d_theta + p_theta, b_dtheta, mask=m_theta)
    if U > 0:
        put_shared(dB + i_g * N, b_dB3, i_row, m_l, 2 * A, U, UP, G * N, L, R, RP)
        put_shared(dC + i_g * N, b_dC3, i_row, m_l, 2 * A, U, UP, G * N, L, R, RP)
