# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Gradients of x, z, D, mimo_* and of every coefficient, chunk by chunk, from S that enters and dS that leaves a chunk.

    P_ij = C_i . B_j      M_ij = decay(j -> i) w_j, gamma_i on the diagonal      Q_ij = dy_i . x_j
    dx_j = sum_i P_ij M_ij dy_i + D dy_j + decay(j -> L) w_j dS B_j
    dw_j = sum_i P_ij Q_ij decay(j -> i) + decay(j -> L) x_j dS B_j              dgamma_i = P_ii Q_ii
    dlog alpha_t = sum of the terms of y and of the next state in which the decay of token t is a factor

y is computed again for the gate. Nothing is divided by a decay or a weight: either may be zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import exp2, sigmoid
from mamba3.ops.triton.states import weights_out
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
def by_token(b_v, L: tl.constexpr, RP: tl.constexpr):
    """Rows [l r] to [l], summed over ranks."""
    if RP == 1:
        return b_v
    else:
        return tl.sum(tl.reshape(b_v, (L, RP)), axis=1)


@triton.jit
def by_rank(b_v, L: tl.constexpr, RP: tl.constexpr, PP: tl.constexpr):
    """Rows [l r, p] to [r, p], summed over tokens."""
    return tl.sum(tl.reshape(b_v, (L, RP, PP)), axis=0)


@triton.jit
def rank_rows(mimo, i_h, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """mimo [h, r, p] for each row [l r, p]."""
    o_r, o_p = tl.arange(0, L * RP) % RP, tl.arange(0, PP)
    m = (o_r < R)[:, None] & (o_p < P)[None, :]
    return tl.load(mimo + i_h * (R * P) + (o_r[:, None] * P + o_p[None, :]), mask=m, other=0.0)


@triton.jit
def put_tokens(v, b_v, i_h, i_t, end, H: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr,
               RP: tl.constexpr):  # fmt: skip
    """Rows [l r, p], summed over ranks, to v [t, h, p]."""
    o_l, o_p = tl.arange(0, L), tl.arange(0, PP)
    if RP > 1:
        b_v = tl.sum(tl.reshape(b_v, (L, RP, PP)), axis=1)
    p_v = v + (i_t.to(tl.int64) * H + i_h) * P + (o_l[:, None] * (H * P) + o_p[None, :])
    tl.store(p_v, b_v.to(v.dtype.element_ty), mask=(i_t + o_l < end)[:, None] & (o_p < P)[None, :])


@triton.jit
def put_ranks(part, b_v, i_h, i_j, H: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, R: tl.constexpr,
              RP: tl.constexpr):  # fmt: skip
    """b_v [r, p] to part [c, h, r, p]."""
    o_r, o_p = tl.arange(0, RP), tl.arange(0, PP)
    p_part = part + (i_j.to(tl.int64) * H + i_h) * (R * P) + (o_r[:, None] * P + o_p[None, :])
    tl.store(p_part, b_v, mask=(o_r < R)[:, None] & (o_p < P)[None, :])


@triton.jit
def decay_gradient(b_row, b_column, b_state, b_kept, EXACT: tl.constexpr):
    """d log alpha_t = sum_{s >= t} (row_s - column_s) + sum_{s < t} state_s + kept, [l]."""
    if EXACT:
        b_row, b_column, b_state = b_row.to(tl.float64), b_column.to(tl.float64), b_state.to(tl.float64)
    b_later = tl.cumsum(b_row - b_column, axis=0, reverse=True)
    b_earlier = tl.cumsum(b_state, axis=0) - b_state
    return (b_later + b_earlier + b_kept).to(tl.float32)


@triton.jit
def gradient_x_kernel(
    x, z, theta, B, C, B_bias, C_bias, mimo_x, mimo_z, mimo_o, D, dy, decay, decay_low, weight, gamma, tick, phase,
    S, dS, chunks, dx, dz, d_log, d_weight, d_gamma, turning, dD, d_mimo_x, d_mimo_z, d_mimo_o,
    c_first, T, x_row, z_row,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr,
    HAS_BIAS_B: tl.constexpr, HAS_BIAS_C: tl.constexpr, HAS_MIMO_X: tl.constexpr, HAS_MIMO_Z: tl.constexpr,
    HAS_MIMO_O: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    EXACT: tl.constexpr, HARDWARE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (head, chunk of the window). S, dS [c - c_first, h, p, n]; chunks [c, 4] of `windows.plan`.

    Rows [h, t]: d_log, d_weight, d_gamma. turning [c - c_first, h, a]: how the next state's gradient turns with the
    entering state. Parts of the parameters' gradients [chunk, h, ...] are summed by the caller.
    """
    i_h, i_j = tl.program_id(0), tl.program_id(1)
    i_c = c_first + i_j
    i_g = i_h // (H // G)
    U: tl.constexpr = N - 2 * A
    o_row, o_token, o_p = tl.arange(0, L * RP), tl.arange(0, L), tl.arange(0, PP)
    o_a, o_u = tl.arange(0, AP), tl.arange(0, UP)
    m_a, m_u = o_a < A, o_u < U
    o_l = o_row // RP
    same = o_l[:, None] == o_l[None, :]
    b_D = 0.0
    if HAS_D:
        b_D = tl.load(D + i_h)
    i_t, end = tl.load(chunks + i_c * 4), tl.load(chunks + i_c * 4 + 1)
    p_state = (i_j.to(tl.int64) * H + i_h) * (P * N)
    if A > 0:
        b_theta, b_tick, b_phase = load_angles(theta, tick, phase, i_h, i_t, end, i_c, T, H, A, AP, L, False)
        b_cos, b_sin = row_angles(b_theta, b_tick, b_phase, end - i_t, AP, L, RP, EXACT, HARDWARE)
    else:
        b_cos = tl.zeros((L * RP, AP), tl.float32)
        b_sin = b_cos
    b_B1, b_B2, b_B3 = load_rows(B, B, i_g, i_t, end, G, N, A, AP, UP, L, R, RP, False)
    b_B1, b_B2, b_B3 = rotated(b_B1, b_B2, b_B3, B_bias, b_cos, b_sin, i_h, N, A, AP, UP, L, R, RP, HAS_BIAS_B, DTYPE)
    b_C1, b_C2, b_C3 = load_rows(C, C, i_g, i_t, end, G, N, A, AP, UP, L, R, RP, False)
    b_C1, b_C2, b_C3 = rotated(b_C1, b_C2, b_C3, C_bias, b_cos, b_sin, i_h, N, A, AP, UP, L, R, RP, HAS_BIAS_C, DTYPE)
    b_P = tl.zeros((L * RP, L * RP), tl.float32)
    if A > 0:
        b_P = product(b_C1, tl.trans(b_B1), b_P)
        b_P = product(b_C2, tl.trans(b_B2), b_P)
    if U > 0:
        b_P = product(b_C3, tl.trans(b_B3), b_P)

    # What the states read and give: y of the entering state, and dx of the leaving one, without weights.
    b_y = tl.zeros((L * RP, PP), tl.float32)
    b_dx = tl.zeros((L * RP, PP), tl.float32)
    b_kept = 0.0
    if A > 0:
        b_S1 = state_tile(S + p_state, o_p, o_a, m_a, P, N)
        b_S2 = state_tile(S + p_state, o_p, A + o_a, m_a, P, N)
        b_dS1 = state_tile(dS + p_state, o_p, o_a, m_a, P, N)
        b_dS2 = state_tile(dS + p_state, o_p, A + o_a, m_a, P, N)
        b_y = product(b_C1, tl.trans(b_S1), b_y)
        b_y = product(b_C2, tl.trans(b_S2), b_y)
        b_dx = product(b_B1, tl.trans(b_dS1), b_dx)
        b_dx = product(b_B2, tl.trans(b_dS2), b_dx)
        b_S1, b_S2, b_dS1, b_dS2 = (
            b_S1.to(tl.float32), b_S2.to(tl.float32), b_dS1.to(tl.float32), b_dS2.to(tl.float32)
        )  # fmt: skip
        b_kept += tl.sum(tl.sum(b_S1 * b_dS1 + b_S2 * b_dS2, axis=1), axis=0)
        b_turning = tl.sum(b_S1 * b_dS2 - b_S2 * b_dS1, axis=0)
    if U > 0:
        b_S3 = state_tile(S + p_state, o_p, 2 * A + o_u, m_u, P, N)
        b_dS3 = state_tile(dS + p_state, o_p, 2 * A + o_u, m_u, P, N)
        b_y = product(b_C3, tl.trans(b_S3), b_y)
        b_dx = product(b_B3, tl.trans(b_dS3), b_dx)
        b_kept += tl.sum(tl.sum(b_S3.to(tl.float32) * b_dS3.to(tl.float32), axis=1), axis=0)

    b_decay = token_row(decay, i_h, i_t, end, T, L, RP)
    b_out, b_w, b_total = weights_out(decay, decay_low, weight, i_h, i_t, end, T, L, RP, EXACT, HARDWARE)
    b_gamma = token_row(gamma, i_h, i_t, end, T, L, RP)
    b_keep = exp2(b_total, HARDWARE)
    b_kept *= b_keep
    if A > 0:
        p_turning = turning + (i_j.to(tl.int64) * H + i_h) * A + o_a
        tl.store(p_turning, b_turning * b_keep, mask=m_a)
    b_between = b_decay[:, None] - b_decay[None, :]
    if EXACT:
        b_low = token_row(decay_low, i_h, i_t, end, T, L, RP)
        b_between += b_low[:, None] - b_low[None, :]
    before = (o_l[:, None] > o_l[None, :]) & (i_t + o_l < end)[:, None]
    b_between = exp2(tl.where(before, b_between, float("-inf")), HARDWARE)
    b_y *= exp2(b_decay, HARDWARE)[:, None]
    b_dx *= b_out[:, None]

    # Through the gate, as far as it does not need y.
    b_x = head_rows(x, mimo_x, i_h, i_t, end, x_row, P, PP, L, R, RP, HAS_MIMO_X, False)
    if HAS_Z:
        b_do = head_rows(dy, dy, i_h, i_t, end, H * P, P, PP, L, R, RP, False, False).to(tl.float32)
        b_z = head_rows(z, mimo_z, i_h, i_t, end, z_row, P, PP, L, R, RP, HAS_MIMO_Z, False).to(tl.float32)
        b_open = sigmoid(b_z, HARDWARE)
        b_dy = b_do * b_z * b_open
        if HAS_MIMO_O:
            b_mimo_o = rank_rows(mimo_o, i_h, P, PP, L, R, RP)
            b_dy *= b_mimo_o
    else:
        p_dy = dy + (i_t.to(tl.int64) * (R * H) + i_h) * P
        p_dy += (o_l * R + o_row % RP)[:, None] * (H * P) + o_p[None, :]
        m_row = (i_t + o_l < end) & (o_row % RP < R)
        b_dy = tl.load(p_dy, mask=m_row[:, None] & (o_p < P)[None, :], other=0.0).to(tl.float32)
    b_xn, b_dyn = b_x.to(DTYPE), b_dy.to(DTYPE)

    b_row = tl.sum(b_dyn.to(tl.float32) * b_y, axis=1)
    b_state = tl.sum(b_xn.to(tl.float32) * b_dx, axis=1)
    if HAS_D:
        b_dD = tl.sum(tl.sum(b_dy * b_xn.to(tl.float32), axis=1), axis=0)
        tl.store(dD + i_j * H + i_h, b_dD)
    b_Q = product(b_dyn, tl.trans(b_xn), tl.zeros((L * RP, L * RP), tl.float32)) * b_P
    b_dgamma = tl.sum(tl.where(same, b_Q, 0.0), axis=1)
    b_Q *= b_between
    b_column = tl.sum(b_Q, axis=0)
    b_row += tl.sum(b_Q * b_w[None, :], axis=1)

    p_token = i_h.to(tl.int64) * T + i_t + o_token
    m_token = i_t + o_token < end
    b_log = decay_gradient(
        by_token(b_row, L, RP), by_token(b_column * b_w, L, RP), by_token(b_state * b_w, L, RP), b_kept, EXACT
    )
    tl.store(d_log + p_token, b_log, mask=m_token)
    tl.store(d_weight + p_token, by_token(b_column + b_state, L, RP), mask=m_token)
    tl.store(d_gamma + p_token, by_token(b_dgamma, L, RP), mask=m_token)

    b_P *= tl.where(same, b_gamma[:, None], b_between * b_w[None, :])
    if HAS_D:
        b_P += tl.where(o_row[:, None] == o_row[None, :], b_D, 0.0)
    b_Pn = b_P.to(DTYPE)
    b_dx = product(tl.trans(b_Pn), b_dyn, b_dx * b_w[:, None])
    if HAS_MIMO_X:
        b_plain = head_rows(x, x, i_h, i_t, end, x_row, P, PP, L, R, RP, False, False).to(tl.float32)
        put_ranks(d_mimo_x, by_rank(b_plain * b_dx, L, RP, PP), i_h, i_j, H, P, PP, R, RP)
        b_dx *= rank_rows(mimo_x, i_h, P, PP, L, R, RP)
    put_tokens(dx, b_dx, i_h, i_t, end, H, P, PP, L, RP)

    if HAS_Z:
        b_y = product(b_Pn, b_xn, b_y) * b_do
        if HAS_MIMO_O:
            put_ranks(d_mimo_o, by_rank(b_y * b_z * b_open, L, RP, PP), i_h, i_j, H, P, PP, R, RP)
            b_y *= b_mimo_o
        b_dz = b_y * b_open * (1.0 + b_z * (1.0 - b_open))
        if HAS_MIMO_Z:
            b_plain = head_rows(z, z, i_h, i_t, end, z_row, P, PP, L, R, RP, False, False).to(tl.float32)
            put_ranks(d_mimo_z, by_rank(b_plain * b_dz, L, RP, PP), i_h, i_j, H, P, PP, R, RP)
            b_dz *= rank_rows(mimo_z, i_h, P, PP, L, R, RP)
        put_tokens(dz, b_dz, i_h, i_t, end, H, P, PP, L, RP)
