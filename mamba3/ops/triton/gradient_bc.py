# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Gradients of C or of B, of its bias, and of the angles, chunk by chunk, summed over the heads of a group.

    dC_i = sum_j Q_ij M_ij B_j + decay(0 -> i) dy_i S              dB_j = sum_i Q_ij M_ij C_i + decay(j -> L) w_j x_j dS
    dphi = dv_2 v_1 - dv_1 v_2 of each pair, for v = B and C       dtheta_t tick_t = sum of dphi from t to the sequence's end

with Q, M of `gradient_x`. One kernel: "own" rows are those of C (then v is dy, u is x and the state S) or of B (v is x, u is
dy, the state dS). Past the chunk's end, the sum of dphi is what the state sees turn: turning all later B and C by one angle
is turning the state back, so that sum_{s > L} dphi_s = -<dS(L), J S(L)>, plus a constant of the sequence that the caller
adds where the last state has a gradient. Each head's gradient is turned back by its own angle before heads are summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import exp2
from mamba3.ops.triton.gradient_x import by_rank
from mamba3.ops.triton.states import output_gradient, weights_out
from mamba3.ops.triton.tiles import (
    head_rows,
    load_angles,
    load_rows,
    product,
    rotated,
    row_angles,
    state_tile,
    token_row,
)


@triton.jit
def later_sums(b_v, tokens, L: tl.constexpr, RP: tl.constexpr, AP: tl.constexpr, EXACT: tl.constexpr):
    """Rows [l r, a] to [l, a]: the sum over ranks and over tokens from l to the chunk's end."""
    o_l, o_row = tl.arange(0, L), tl.arange(0, L * RP)
    # The second term is always true where it matters; see `row_angles`.
    b_from = tl.where((o_l[:, None] <= (o_row // RP)[None, :]) & (o_l < tokens)[:, None], 1.0, 0.0)
    b_zero = tl.zeros((L, AP), tl.float32)
    if EXACT:
        return product(b_from, b_v, b_zero)
    else:
        high = b_v.to(tl.bfloat16)
        low = (b_v - high.to(tl.float32)).to(tl.bfloat16)
        return product(b_from.to(tl.bfloat16), low, product(b_from.to(tl.bfloat16), high, b_zero))


@triton.jit
def put_part(
    part, b_v, i_h, i_c, first, WIDTH: tl.constexpr, n, H: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Rows [l r, n], summed over tokens, to channels from `first` on of part [c, h, r, n]."""
    o_r, o_n = tl.arange(0, RP), tl.arange(0, WIDTH)
    p_part = part + (i_c.to(tl.int64) * H + i_h) * (R * N) + (o_r[:, None] * N + (first + o_n)[None, :])
    tl.store(p_part, by_rank(b_v, L, RP, WIDTH), mask=(o_r < R)[:, None] & (o_n < n)[None, :])


@triton.jit
def put_rows(
    part, b_v, i_row, i_g, tokens, first, WIDTH: tl.constexpr, n, G: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Rows [l r, n] to channels from `first` on of part [t r, g, n], from row i_row (int64) on."""
    o_row, o_n = tl.arange(0, L * RP), tl.arange(0, WIDTH)
    o_l, o_r = o_row // RP, o_row % RP
    p_part = part + (i_row * G + i_g) * N + ((o_l * R + o_r)[:, None] * (G * N) + (first + o_n)[None, :])
    m_row = (o_l < tokens) & (o_r < R)
    tl.store(p_part, b_v.to(part.dtype.element_ty), mask=m_row[:, None] & (o_n < n)[None, :])


@triton.jit
def gradient_bc_kernel(
    x, z, theta, B, C, B_bias, C_bias, mimo_x, mimo_z, mimo_o, dy, decay, decay_low, weight, gamma, tick, phase,
    S, turning, chunks, d_own, d_theta, d_tick, d_bias, c_first, t_first, Tw, T, x_row, z_row,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr,
    SIDE_B: tl.constexpr, HAS_BIAS_B: tl.constexpr, HAS_BIAS_C: tl.constexpr, HAS_MIMO_X: tl.constexpr,
    HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr, HAS_Z: tl.constexpr,
    EXACT: tl.constexpr, HARDWARE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (block of HEADS heads of a group, chunk of the window). S: dS where SIDE_B.

    Parts, of Tw tokens from t_first on: d_own [block, t r, g, n], d_theta [g block, t, a], d_bias [c, h, r, n].
    d_tick [h, t]. turning [c, h, a] comes from `gradient_x`; where SIDE_B what this chunk gives the state is added to it.
    """
    i_b, i_j = tl.program_id(0), tl.program_id(1)
    BLOCKS: tl.constexpr = (H // G + HEADS - 1) // HEADS
    i_g, i_b = i_b // BLOCKS, i_b % BLOCKS
    U: tl.constexpr = N - 2 * A
    o_row, o_token, o_p = tl.arange(0, L * RP), tl.arange(0, L), tl.arange(0, PP)
    o_a, o_u = tl.arange(0, AP), tl.arange(0, UP)
    m_a, m_u = o_a < A, o_u < U
    o_l = o_row // RP
    i_c = c_first + i_j
    i_t, end = tl.load(chunks + i_c * 4), tl.load(chunks + i_c * 4 + 1)
    m_token = i_t + o_token < end
    m_row = i_t + o_l < end

    b_d1 = tl.zeros((L * RP, AP), tl.float32)
    b_d2 = tl.zeros((L * RP, AP), tl.float32)
    b_d3 = tl.zeros((L * RP, UP), tl.float32)
    b_dtheta = tl.zeros((L, AP), tl.float32)
    head = i_g * (H // G) + i_b * HEADS
    for i in tl.range(0, tl.minimum(HEADS, H // G - i_b * HEADS), num_stages=1):
        i_h = head + i
        if A > 0:
            b_theta, b_tick, b_phase = load_angles(theta, tick, phase, i_h, i_t, end, i_c, T, H, A, AP, L, False)
            b_cos, b_sin = row_angles(b_theta, b_tick, b_phase, end - i_t, AP, L, RP, EXACT, HARDWARE)
        else:
            b_cos = tl.zeros((L * RP, AP), tl.float32)
            b_sin = b_cos
        b_x = head_rows(x, mimo_x, i_h, i_t, end, x_row, P, PP, L, R, RP, HAS_MIMO_X, False).to(DTYPE)
        b_dy = output_gradient(
            dy, z, mimo_z, mimo_o, i_h, i_t, end, z_row, H, P, PP, L, R, RP, HAS_Z, HAS_MIMO_Z, HAS_MIMO_O, HARDWARE
        ).to(DTYPE)
        b_decay = token_row(decay, i_h, i_t, end, T, L, RP)
        b_out, b_w, _ = weights_out(decay, decay_low, weight, i_h, i_t, end, T, L, RP, EXACT, HARDWARE)
        b_gamma = token_row(gamma, i_h, i_t, end, T, L, RP)
        b_between = b_decay[:, None] - b_decay[None, :]
        if EXACT:
            b_low = token_row(decay_low, i_h, i_t, end, T, L, RP)
            b_between += b_low[:, None] - b_low[None, :]
        b_Q = tl.zeros((L * RP, L * RP), tl.float32)
        if SIDE_B:  # rows are s, columns t
            m_between = (o_l[:, None] < o_l[None, :]) & m_row[None, :]
            b_Q = product(b_x, tl.trans(b_dy), b_Q)
            b_between = exp2(tl.where(m_between, -b_between, float("-inf")), HARDWARE) * b_w[:, None]
            b_v, b_into = b_x, b_out * b_w
        else:
            m_between = (o_l[:, None] > o_l[None, :]) & m_row[:, None]
            b_Q = product(b_dy, tl.trans(b_x), b_Q)
            b_between = exp2(tl.where(m_between, b_between, float("-inf")), HARDWARE) * b_w[None, :]
            b_v, b_into = b_dy, exp2(b_decay, HARDWARE)
        b_Q *= tl.where(o_l[:, None] == o_l[None, :], b_gamma[:, None], b_between)
        b_Qn = b_Q.to(DTYPE)

        b_B1, b_B2, b_B3 = load_rows(B, B, i_g, i_t, end, G, N, A, AP, UP, L, R, RP, False)
        b_C1, b_C2, b_C3 = load_rows(C, C, i_g, i_t, end, G, N, A, AP, UP, L, R, RP, False)
        b_B1, b_B2, b_B3 = rotated(
            b_B1, b_B2, b_B3, B_bias, b_cos, b_sin, i_h, N, A, AP, UP, L, R, RP, HAS_BIAS_B, DTYPE
        )
        b_C1, b_C2, b_C3 = rotated(
            b_C1, b_C2, b_C3, C_bias, b_cos, b_sin, i_h, N, A, AP, UP, L, R, RP, HAS_BIAS_C, DTYPE
        )
        if SIDE_B:
            b_1, b_2, b_other1, b_other2, b_other3 = b_B1, b_B2, b_C1, b_C2, b_C3
        else:
            b_1, b_2, b_other1, b_other2, b_other3 = b_C1, b_C2, b_B1, b_B2, b_B3
        p_S = S + ((i_c - c_first).to(tl.int64) * H + i_h) * (P * N)
        if A > 0:
            b_zero = tl.zeros((L * RP, AP), tl.float32)
            b_g1 = product(b_v, state_tile(p_S, o_p, o_a, m_a, P, N), b_zero) * b_into[:, None]
            b_g2 = product(b_v, state_tile(p_S, o_p, A + o_a, m_a, P, N), b_zero) * b_into[:, None]
            b_1, b_2 = b_1.to(tl.float32), b_2.to(tl.float32)
            if SIDE_B:
                p_turning = turning + ((i_c - c_first).to(tl.int64) * H + i_h) * A + o_a
                b_turning = tl.load(p_turning, mask=m_a, other=0.0) + tl.sum(b_g2 * b_1 - b_g1 * b_2, axis=0)
                tl.store(p_turning, b_turning, mask=m_a)
            b_g1 = product(b_Qn, b_other1, b_g1)
            b_g2 = product(b_Qn, b_other2, b_g2)
            b_later = later_sums(b_g2 * b_1 - b_g1 * b_2, end - i_t, L, RP, AP, EXACT)
            if SIDE_B:
                b_later -= b_turning[None, :]
            b_dtheta += b_later * b_tick[:, None]
            tl.store(
                d_tick + i_h.to(tl.int64) * T + i_t + o_token,
                tl.sum(b_later * b_theta.to(tl.float32), axis=1),
                mask=m_token,
            )
            b_back = b_g1 * b_cos + b_g2 * b_sin
            b_g2 = b_g2 * b_cos - b_g1 * b_sin
            b_d1 += b_back
            b_d2 += b_g2
            if (SIDE_B and HAS_BIAS_B) or (not SIDE_B and HAS_BIAS_C):
                put_part(d_bias, b_back, i_h, i_j, 0, AP, A, H, N, L, R, RP)
                put_part(d_bias, b_g2, i_h, i_j, A, AP, A, H, N, L, R, RP)
        if U > 0:
            b_g3 = product(b_v, state_tile(p_S, o_p, 2 * A + o_u, m_u, P, N), tl.zeros((L * RP, UP), tl.float32))
            b_g3 = product(b_Qn, b_other3, b_g3 * b_into[:, None])
            b_d3 += b_g3
            if (SIDE_B and HAS_BIAS_B) or (not SIDE_B and HAS_BIAS_C):
                put_part(d_bias, b_g3, i_h, i_j, 2 * A, UP, U, H, N, L, R, RP)

    i_row = (i_b.to(tl.int64) * Tw + (i_t - t_first)) * R
    if A > 0:
        put_rows(d_own, b_d1, i_row, i_g, end - i_t, 0, AP, A, G, N, L, R, RP)
        put_rows(d_own, b_d2, i_row, i_g, end - i_t, A, AP, A, G, N, L, R, RP)
        p_theta = d_theta + ((i_g * BLOCKS + i_b).to(tl.int64) * Tw + (i_t - t_first)) * A
        p_theta += o_token[:, None] * A + o_a[None, :]
        tl.store(p_theta, b_dtheta, mask=m_token[:, None] & m_a[None, :])
    if U > 0:
        put_rows(d_own, b_d3, i_row, i_g, end - i_t, 2 * A, UP, U, G, N, L, R, RP)
