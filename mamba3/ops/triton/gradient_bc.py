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

from mamba3.ops.triton.angles import RADIANS_PER_TURN, cos_sin, from_fixed
from mamba3.ops.triton.tiles import pinned, product, token_sums


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
def angle_part(
    turn, phase, i_h, i_t, i_c, m_l, first, T, H: tl.constexpr, A: tl.constexpr, WIDTH: tl.constexpr, L: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """`channels.rotation` for WIDTH angles from `first` on."""
    o_l, o_a = tl.arange(0, L)[:, None, None], first + tl.arange(0, WIDTH)[None, None, :]
    b_phase = tl.load(phase + (i_c.to(tl.int64) * H + i_h) * A + o_a, mask=o_a < A, other=0)
    p_turn = turn + (i_h.to(tl.int64) * T + i_t) * A + (o_l * A + o_a)
    b_turn = tl.load(p_turn, mask=m_l[:, None, None] & (o_a < A), other=0)
    if turn.dtype.element_ty == tl.int16:
        b_turn = b_turn.to(tl.int32) << 16
    if HARDWARE:
        b_cos, b_sin = cos_sin((b_turn + b_phase).to(tl.float32) * (RADIANS_PER_TURN * 2.0**-32), True)
    else:
        b_cos, b_sin = cos_sin(from_fixed(b_turn + b_phase), False)
    return pinned(b_cos, HARDWARE), pinned(b_sin, HARDWARE)


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
def put_part(
    v, b_v, i_row, m_l, first, stop, S: tl.constexpr, WIDTH: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr,
):  # fmt: skip
    """The inverse of `part_of_rows`."""
    o_l, o_r = tl.arange(0, L)[:, None, None], tl.arange(0, RP)[None, :, None]
    o_n = first + tl.arange(0, WIDTH)[None, None, :]
    p_v = v + i_row * S + ((o_l * R + o_r) * S + o_n)
    tl.store(p_v, b_v.to(v.dtype.element_ty), mask=m_l[:, None, None] & (o_r < R) & (o_n < stop))


@triton.jit
def biased(b_v, bias, i_h, first, stop, N: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
           HAS_BIAS: tl.constexpr):  # fmt: skip
    """b_v [l, r, n] with channels from `first` on, before `stop`, of bias [h, r, n]."""
    if HAS_BIAS:
        o_r, o_n = tl.arange(0, RP)[None, :, None], first + tl.arange(0, WIDTH)[None, None, :]
        b_v += tl.load(bias + i_h * (R * N) + (o_r * N + o_n), mask=(o_r < R) & (o_n < stop), other=0.0)
    return b_v


@triton.jit
def put_bias(
    d_bias, b_v, i_h, i_j, o_n, m_n, WIDTH: tl.constexpr, H: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows [l r, n], summed over tokens, to channels o_n of d_bias [c, h, r, n]."""
    b_sum = token_sums(b_v, WIDTH, L, RP, DTYPE)
    o_r = tl.arange(0, b_sum.shape[0])
    p_bias = d_bias + (i_j.to(tl.int64) * H + i_h) * (R * N) + (o_r[:, None] * N + o_n[None, :])
    tl.store(p_bias, b_sum, mask=(o_r < R)[:, None] & m_n[None, :])


@triton.jit
def turned_back(
    rows, d_bias, b_sum1, b_sum2, b_own1, b_own2, bias, b_cos, b_sin, i_h, i_j, m_l, first,
    H: tl.constexpr, N: tl.constexpr, A: tl.constexpr, AB: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, HAS_BIAS: tl.constexpr, HARDWARE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds a head's share of pairs to the sums; what it says of the angle, dv_2 v_1 - dv_1 v_2 [l, r, a]."""
    i_own = (i_j.to(tl.int64) * H + i_h) * (L * R)
    b_1 = part_of_rows(rows, i_own, m_l, first, A, N, AB, L, R, RP)
    b_2 = part_of_rows(rows, i_own, m_l, A + first, 2 * A, N, AB, L, R, RP)
    b_back1 = pinned(b_1 * b_cos + b_2 * b_sin, HARDWARE)
    b_back2 = pinned(b_2 * b_cos - b_1 * b_sin, HARDWARE)
    if HAS_BIAS:
        b_both = tl.permute(tl.join(b_back1.to(DTYPE), b_back2.to(DTYPE)), (0, 1, 3, 2))
        o_q = tl.arange(0, 2 * AB)
        o_a = first + o_q % AB
        b_both = tl.reshape(b_both, (L * RP, 2 * AB))
        put_bias(d_bias, b_both, i_h, i_j, o_q // AB * A + o_a, o_a < A, 2 * AB, H, N, L, R, RP, DTYPE)
    b_own1 = biased(b_own1, bias, i_h, first, A, N, AB, R, RP, HAS_BIAS)
    b_own2 = biased(b_own2, bias, i_h, A + first, 2 * A, N, AB, R, RP, HAS_BIAS)
    return b_sum1 + b_back1, b_sum2 + b_back2, b_back2 * b_own1 - b_back1 * b_own2


@triton.jit
def sum_of_heads(
    rows, v, d_bias, i_j, i_row, m_l, head, count, first, GN: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    UB: tl.constexpr, L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Unrotated channels of B or of C, from `first` on."""
    b_sum = tl.zeros((L, RP, UB), tl.float32)
    o_n = first + tl.arange(0, UB)
    for i in tl.range(0, count, num_stages=STAGES):
        i_own = (i_j.to(tl.int64) * H + head + i) * (L * R)
        b_v = part_of_rows(rows, i_own, m_l, first, N, N, UB, L, R, RP)
        b_sum += b_v
        if HAS_BIAS:
            b_v = tl.reshape(b_v.to(DTYPE), (L * RP, UB))
            put_bias(d_bias, b_v, head + i, i_j, o_n, o_n < N, UB, H, N, L, R, RP, DTYPE)
    put_part(v, b_sum, i_row, m_l, first, N, GN, UB, L, R, RP)


@triton.jit(do_not_specialize=["c_first", "t_first", "Tw"])
def gradient_bc_kernel(
    theta, tick, B, C, B_bias, C_bias, turn, phase, dB_rows, dC_rows, turning, chunks, dB, dC, d_theta, d_tick, dB_bias,
    dC_bias, c_first, t_first, Tw, T,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, N: tl.constexpr, A: tl.constexpr,
    AB: tl.constexpr, PARTS: tl.constexpr, UB: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr,
    HAS_BIAS_B: tl.constexpr, HAS_BIAS_C: tl.constexpr, EXACT: tl.constexpr, HARDWARE: tl.constexpr,
    LEAVING: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (block of HEADS heads of a group, chunk of the window, part of the channels).

    The first PARTS parts are AB pairs each; then UB unrotated channels each of C, then of B.
    dB_rows, dC_rows, turning of `gradient_rows_kernel`; LEAVING makes turning that of the state the chunk leaves.
    Sums of blocks, of Tw tokens from t_first on: dB, dC [block, t r, g, n], d_theta [g block, t, a]; biases
    [c - c_first, h, r, n]; d_tick [part, h, t].
    """
    i_b, i_j, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    BLOCKS: tl.constexpr = (H // G + HEADS - 1) // HEADS
    REST: tl.constexpr = (N - 2 * A + UB - 1) // UB
    i_g, i_b = i_b // BLOCKS, i_b % BLOCKS
    o_token, o_a = tl.arange(0, L), tl.arange(0, AB)
    i_c = c_first + i_j
    i_t, end = tl.load(chunks + i_c * 5), tl.load(chunks + i_c * 5 + 1)
    m_l = i_t + o_token < end
    i_row = (i_b.to(tl.int64) * Tw + (i_t - t_first)) * R
    head, count = i_g * (H // G) + i_b * HEADS, tl.minimum(HEADS, H // G - i_b * HEADS)
    if i_part >= PARTS + REST:
        sum_of_heads(
            dB_rows, dB + i_g * N, dB_bias, i_j, i_row, m_l, head, count, 2 * A + (i_part - PARTS - REST) * UB, G * N,
            H, N, UB, L, R, RP, HAS_BIAS_B, STAGES, DTYPE,
        )  # fmt: skip
    elif i_part >= PARTS:
        sum_of_heads(
            dC_rows, dC + i_g * N, dC_bias, i_j, i_row, m_l, head, count, 2 * A + (i_part - PARTS) * UB, G * N,
            H, N, UB, L, R, RP, HAS_BIAS_C, STAGES, DTYPE,
        )  # fmt: skip
    elif A > 0:
        first = i_part * AB
        b_dB1 = tl.zeros((L, RP, AB), tl.float32)
        b_dB2, b_dC1, b_dC2 = b_dB1, b_dB1, b_dB1
        b_dtheta = tl.zeros((L, AB), tl.float32)
        o_theta = i_t.to(tl.int64) * A + (o_token[:, None] * A + (first + o_a)[None, :])
        m_theta = m_l[:, None] & (first + o_a < A)[None, :]
        b_theta = tl.load(theta + o_theta, mask=m_theta, other=0.0)
        i_shared = i_t.to(tl.int64) * R
        b_B1 = part_of_rows(B + i_g * N, i_shared, m_l, first, A, G * N, AB, L, R, RP)
        b_B2 = part_of_rows(B + i_g * N, i_shared, m_l, A + first, 2 * A, G * N, AB, L, R, RP)
        b_C1 = part_of_rows(C + i_g * N, i_shared, m_l, first, A, G * N, AB, L, R, RP)
        b_C2 = part_of_rows(C + i_g * N, i_shared, m_l, A + first, 2 * A, G * N, AB, L, R, RP)
        for i in tl.range(0, count, num_stages=STAGES):
            i_h = head + i
            b_cos, b_sin = angle_part(turn, phase, i_h, i_t, i_c, m_l, first, T, H, A, AB, L, HARDWARE)
            b_dC1, b_dC2, b_dphi = turned_back(
                dC_rows, dC_bias, b_dC1, b_dC2, b_C1, b_C2, C_bias, b_cos, b_sin, i_h, i_j, m_l, first,
                H, N, A, AB, L, R, RP, HAS_BIAS_C, HARDWARE, DTYPE,
            )  # fmt: skip
            b_dB1, b_dB2, b_dphi_B = turned_back(
                dB_rows, dB_bias, b_dB1, b_dB2, b_B1, b_B2, B_bias, b_cos, b_sin, i_h, i_j, m_l, first,
                H, N, A, AB, L, R, RP, HAS_BIAS_B, HARDWARE, DTYPE,
            )  # fmt: skip
            b_dphi = tl.sum(b_dphi + b_dphi_B, axis=1)  # [l, a]
            p_turning = turning + (i_c.to(tl.int64) * H + i_h) * A + first + o_a
            b_turning = tl.load(p_turning, mask=first + o_a < A, other=0.0)
            b_later = -b_turning[None, :] - earlier_sums(b_dphi, L, AB, EXACT)
            if LEAVING:
                tl.store(p_turning, b_turning + tl.sum(b_dphi, axis=0), mask=first + o_a < A)
            b_tick = tl.load(tick + (i_t.to(tl.int64) + o_token) * H + i_h, mask=m_l, other=0.0)
            b_dtheta += b_later * b_tick[:, None]
            p_tick = d_tick + (i_part * H + i_h).to(tl.int64) * T + i_t + o_token
            tl.store(p_tick, tl.sum(b_later * b_theta, axis=1), mask=m_l)
        put_part(dB + i_g * N, b_dB1, i_row, m_l, first, A, G * N, AB, L, R, RP)
        put_part(dB + i_g * N, b_dB2, i_row, m_l, A + first, 2 * A, G * N, AB, L, R, RP)
        put_part(dC + i_g * N, b_dC1, i_row, m_l, first, A, G * N, AB, L, R, RP)
        put_part(dC + i_g * N, b_dC2, i_row, m_l, A + first, 2 * A, G * N, AB, L, R, RP)
        p_theta = d_theta + ((i_g * BLOCKS + i_b).to(tl.int64) * Tw + (i_t - t_first)) * A
        tl.store(p_theta + (o_token[:, None] * A + (first + o_a)[None, :]), b_dtheta, mask=m_theta)
