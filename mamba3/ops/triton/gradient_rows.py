# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""All matrix products of the backward pass, chunk by chunk and head by head, from S that enters and dS that leaves a chunk.

    P_ij = C_i . B_j      M_ij = decay(j -> i) w_j, gamma_i on the diagonal      Q_ij = dy_i . x_j
    dx_j = sum_i P_ij M_ij dy_i + D dy_j + decay(j -> L) w_j dS B_j
    dC_i = sum_j Q_ij M_ij B_j + decay(0 -> i) dy_i S              dB_j = sum_i Q_ij M_ij C_i + decay(j -> L) w_j x_j dS
    column_j = sum_i P_ij Q_ij decay(j -> i)        state_j = decay(j -> L) x_j dS B_j        dgamma_i = P_ii Q_ii
    row_i = sum_{j < i} P_ij Q_ij M_ij + decay(0 -> i) dy_i S C_i                             kept = 2^total <S, dS>

B and C are rotated here; their gradients are turned back by the head's own angles, and say of these, for v = B and C,

    dphi = dv_2 v_1 - dv_1 v_2 of each pair

`gradient_bc` sums heads. y is computed again for the gate. Nothing is divided by a decay or a weight: either may be zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import exp2, rounded_product, sigmoid
from mamba3.ops.triton.channels import (
    columns,
    head_channels,
    of_tokens,
    rank_weights,
    rotated_rows,
    rotation,
    state_tile,
    turned_back,
)
from mamba3.ops.triton.states import decay_out, output_gradient, ranked_rows
from mamba3.ops.triton.tiles import pinned, product, rank_sums, token_sums


@triton.jit
def by_token(b_v, L: tl.constexpr, RP: tl.constexpr):
    """Rows [l r] to [l], summed over ranks."""
    if RP == 1:
        return b_v
    else:
        return tl.sum(tl.reshape(b_v, (L, RP)), axis=1)


@triton.jit
def put_tokens(
    v, b_v, i_h, i_t, end, H: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr, RP: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """[l, r, p], summed over ranks, to v [t, h, p]."""
    b_v = tl.reshape(b_v, (L * RP, PP))
    if RP > 1:
        b_v = rank_sums(b_v.to(DTYPE), PP, L, RP, DTYPE)
    o_l, o_p = tl.arange(0, b_v.shape[0]), tl.arange(0, PP)
    p_v = v + (i_t.to(tl.int64) * H + i_h) * P + (o_l[:, None] * (H * P) + o_p[None, :])
    m_l = (o_l < L) & (i_t + o_l < end)
    tl.store(p_v, b_v.to(v.dtype.element_ty), mask=m_l[:, None] & (o_p < P)[None, :])


@triton.jit
def put_ranks(
    part, b_v, i_h, i_j, H: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[l, r, p], summed over tokens, to part [c, h, r, p]."""
    b_sum = token_sums(tl.reshape(b_v.to(DTYPE), (L * RP, PP)), PP, L, RP, DTYPE)
    o_r, o_p = tl.arange(0, b_sum.shape[0]), tl.arange(0, PP)
    p_part = part + (i_j.to(tl.int64) * H + i_h) * (R * P) + (o_r[:, None] * P + o_p[None, :])
    tl.store(p_part, b_sum, mask=(o_r < R)[:, None] & (o_p < P)[None, :])


@triton.jit
def put_rows(
    d_rows, b_v, i_h, i_j, H: tl.constexpr, N: tl.constexpr, A: tl.constexpr, W: tl.constexpr, NQ: tl.constexpr,
    L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Rows [l r, n] to d_rows [c, h, l r, n]."""
    o_row = tl.arange(0, L * RP)
    o_n, m_n = columns(N, A, W, NQ)
    o_l, o_r = o_row // RP, o_row % RP
    p_rows = d_rows + (i_j.to(tl.int64) * H + i_h) * (L * R * N) + ((o_l * R + o_r)[:, None] * N + o_n[None, :])
    tl.store(p_rows, b_v.to(d_rows.dtype.element_ty), mask=(o_r < R)[:, None] & m_n[None, :])


@triton.jit
def pairs(S, o_p, A: tl.constexpr, W: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """The first and the second channels of the pairs of a state [p, n], [p, a] each."""
    o_a = tl.arange(0, W)
    m = (o_p < P)[:, None] & (o_a < A)[None, :]
    p_S = S + o_p[:, None] * N + o_a[None, :]
    return tl.load(p_S, mask=m, other=0.0), tl.load(p_S + A, mask=m, other=0.0)


@triton.jit(do_not_specialize=["c_first", "k_first"])
def gradient_rows_kernel(
    x, z, B, C, B_bias, C_bias, mimo_x, mimo_z, mimo_o, D, dy, decay, decay_low, weight, gamma, turn, phase,
    S, dS, chunks, dx, dz, dB_rows, dC_rows, dphi_rows, d_row, d_column, d_state, d_gamma, d_kept, turning, dD,
    d_mimo_x, d_mimo_z, d_mimo_o, c_first, k_first, T, x_row, z_row,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, W: tl.constexpr, NQ: tl.constexpr, L: tl.constexpr,
    HAS_BIAS_B: tl.constexpr, HAS_BIAS_C: tl.constexpr, HAS_MIMO_X: tl.constexpr, HAS_MIMO_Z: tl.constexpr,
    HAS_MIMO_O: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    EXACT: tl.constexpr, HARDWARE: tl.constexpr, BULK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (head, chunk of the piece). S, dS [slot, h, p, n] of `states_kernel`; chunks [c, 5] of `windows.plan`.

    dB_rows, dC_rows [c - c_first, h, l r, n], dphi_rows [c - c_first, h, l r, a]. Rows [h, t] for `gradient_dt`: d_row,
    d_column, d_state, d_gamma; d_kept [c, h]. turning [c, h, a]: how the gradient of the entering state turns with it. Parts
    of the parameters' gradients [c - c_first, h, ...] are summed by the caller.
    """
    i_h, i_j = tl.program_id(0), tl.program_id(1)
    i_c = c_first + i_j
    i_g = i_h // (H // G)
    COARSE: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300, a constant of the kernel beside one of the language
    o_row, o_token, o_p = tl.arange(0, L * RP), tl.arange(0, L), tl.arange(0, PP)
    o_l = o_row // RP
    same = o_l[:, None] == o_l[None, :]
    i_t, end, i_k = tl.load(chunks + i_c * 5), tl.load(chunks + i_c * 5 + 1), tl.load(chunks + i_c * 5 + 4)
    slot = ((i_j + i_k - k_first).to(tl.int64) * H + i_h) * (P * N)

    # What comes from far is asked for first, so that it is waited for once; with ranks, shared memory has no room for dS.
    b_S = state_tile(S + slot, P, P, PP, N, A, W, NQ)

    # B and C, turned.
    if A > 0:
        b_cos, b_sin = rotation(turn, phase, i_h, i_t, end, i_c, T, H, A, W, L, HARDWARE, BULK)
    else:
        b_cos = tl.zeros((L, 1, W), tl.float32)
        b_sin = b_cos
    b_B = rotated_rows(
        B, B_bias, b_cos, b_sin, i_h, i_g, i_t, end, G, N, A, W, NQ, L, R, RP, HAS_BIAS_B, BULK, DTYPE, True
    )
    b_C = rotated_rows(
        C, C_bias, b_cos, b_sin, i_h, i_g, i_t, end, G, N, A, W, NQ, L, R, RP, HAS_BIAS_C, BULK, DTYPE, True
    )
    b_B, b_C = pinned(b_B, HARDWARE), pinned(b_C, HARDWARE)
    # Scores, how much of each reaches y, and what scores and weights get: all of a chunk's pairs of rows die here.
    b_dy = output_gradient(
        dy, z, mimo_z, mimo_o, i_h, i_t, end, z_row, H, P, PP, L, R, RP, HAS_Z, HAS_MIMO_Z, HAS_MIMO_O, HARDWARE, BULK,
        COARSE and not HAS_D,
    )  # fmt: skip
    b_x = ranked_rows(x, mimo_x, i_h, i_t, end, x_row, P, PP, L, R, RP, HAS_MIMO_X, BULK, DTYPE)
    if HAS_D:
        b_dD = rounded_product(b_dy, tl.reshape(b_x, (L, RP, PP)).to(tl.float32), HARDWARE)
        tl.store(dD + i_j * H + i_h, tl.sum(tl.sum(tl.sum(b_dD, axis=2), axis=1), axis=0))
    b_dy = pinned(tl.reshape(b_dy.to(DTYPE), (L * RP, PP)), HARDWARE)
    b_decay = of_tokens(decay, i_h, i_t, end, T, L, RP, BULK)
    b_w, b_gamma = (of_tokens(weight, i_h, i_t, end, T, L, RP, BULK), of_tokens(gamma, i_h, i_t, end, T, L, RP, BULK))
    # decay(j -> i) before the diagonal, 1 on it.
    b_between = tl.where(i_t + o_l < end, b_decay, float("-inf"))[:, None] - b_decay[None, :]
    if EXACT:
        b_low = of_tokens(decay_low, i_h, i_t, end, T, L, RP, BULK)
        b_between += b_low[:, None] - b_low[None, :]
    b_between = tl.where(same, 0.0, tl.where(o_l[:, None] > o_l[None, :], b_between, float("-inf")))
    b_between = exp2(b_between, HARDWARE)
    b_P = product(b_C, tl.trans(b_B), tl.zeros((L * RP, L * RP), tl.float32))
    b_Q = product(b_dy, tl.trans(b_x), tl.zeros((L * RP, L * RP), tl.float32))
    b_M = b_between * tl.where(same, b_gamma[:, None], b_w[None, :])
    b_Pn = (b_P * b_M).to(DTYPE)
    b_P *= b_between * b_Q
    b_Q = (b_Q * b_M).to(DTYPE)
    b_dgamma = tl.sum(tl.where(same, b_P, 0.0), axis=1)
    b_P = tl.where(same, 0.0, b_P)
    b_column = tl.sum(b_P, axis=0)
    b_row = tl.sum(b_P * b_w[None, :], axis=1)
    p_token = i_h.to(tl.int64) * T + i_t + o_token
    m_token = i_t + o_token < end
    tl.store(d_column + p_token, by_token(b_column, L, RP), mask=m_token)
    tl.store(d_gamma + p_token, by_token(b_dgamma, L, RP), mask=m_token)

    if RP == 1:  # with ranks, shared memory has no room for it beside the gate
        b_dS = state_tile(dS + slot + H * P * N, P, P, PP, N, A, W, NQ)

    # y, and through the gate.
    b_into = exp2(b_decay, HARDWARE)
    b_y = product(b_C, tl.trans(b_S), tl.zeros((L * RP, PP), tl.float32)) * b_into[:, None]
    b_row += tl.sum(b_dy.to(tl.float32) * b_y, axis=1)
    tl.store(d_row + p_token, by_token(b_row, L, RP), mask=m_token)
    b_D = 0.0
    if HAS_D:
        b_D = tl.load(D + i_h)
    if HAS_Z:
        b_y = product(b_Pn, b_x, b_y) + b_D * b_x.to(tl.float32)
        b_z = head_channels(z, i_h, i_t, end, z_row, P, PP, L, BULK).to(tl.float32)
        b_do = head_channels(dy, i_h, i_t, end, H * P, P, PP, L, BULK).to(tl.float32)
        b_y = tl.reshape(b_y, (L, RP, PP)) * b_do
        b_zr = b_z
        if HAS_MIMO_Z:
            b_mimo_z = rank_weights(mimo_z, i_h, P, PP, R, RP)
            b_zr *= b_mimo_z
        b_open = sigmoid(b_zr, HARDWARE, COARSE)
        if HAS_MIMO_O:
            put_ranks(d_mimo_o, b_y * (b_zr * b_open), i_h, i_j, H, P, PP, L, R, RP, DTYPE)
            b_y *= rank_weights(mimo_o, i_h, P, PP, R, RP)
        b_dz = b_y * (b_open * (1.0 + b_zr * (1.0 - b_open)))
        if HAS_MIMO_Z:
            put_ranks(d_mimo_z, b_z * b_dz, i_h, i_j, H, P, PP, L, R, RP, DTYPE)
            b_dz *= b_mimo_z
        put_tokens(dz, b_dz, i_h, i_t, end, H, P, PP, L, RP, DTYPE)

    # x, by way of the chunk and of the state.
    b_out, b_total = decay_out(decay, decay_low, i_h, i_t, end, T, L, RP, BULK, EXACT)
    b_out = exp2(b_out, HARDWARE)
    if RP > 1:
        b_dS = state_tile(dS + slot + H * P * N, P, P, PP, N, A, W, NQ)
    if EXACT:
        b_kept = b_S * b_dS
    else:  # the trace of a product takes a third of the instructions
        b_kept = product(b_S, tl.trans(b_dS), tl.zeros((PP, PP), tl.float32))
        b_kept = tl.where(o_p[:, None] == o_p[None, :], b_kept, 0.0)
    b_kept = tl.sum(tl.sum(b_kept, axis=1), axis=0)
    tl.store(d_kept + i_c * H + i_h, b_kept * exp2(b_total, HARDWARE))
    b_dx = product(b_B, tl.trans(b_dS), tl.zeros((L * RP, PP), tl.float32)) * b_out[:, None]
    b_state = tl.sum(b_x.to(tl.float32) * b_dx, axis=1)
    tl.store(d_state + p_token, by_token(b_state, L, RP), mask=m_token)
    b_dx = product(tl.trans(b_Pn), b_dy, b_dx * b_w[:, None]) + b_D * b_dy.to(tl.float32)
    b_dx = tl.reshape(b_dx, (L, RP, PP))
    if HAS_MIMO_X:
        b_plain = head_channels(x, i_h, i_t, end, x_row, P, PP, L, BULK).to(tl.float32)
        put_ranks(d_mimo_x, b_plain * b_dx, i_h, i_j, H, P, PP, L, R, RP, DTYPE)
        b_dx *= rank_weights(mimo_x, i_h, P, PP, R, RP)
    put_tokens(dx, b_dx, i_h, i_t, end, H, P, PP, L, RP, DTYPE)

    if A > 0:
        b_cos, b_sin = rotation(turn, phase, i_h, i_t, end, i_c, T, H, A, W, L, HARDWARE, BULK)
        b_cos, b_sin = pinned(b_cos, HARDWARE), pinned(b_sin, HARDWARE)
    b_dB = product(b_x, b_dS, tl.zeros((L * RP, NQ), tl.float32)) * (b_out * b_w)[:, None]
    b_dB = product(tl.trans(b_Q), b_C, b_dB)
    if A > 0:
        b_dB, b_dphi = turned_back(
            b_dB, b_cos, b_sin, B, B_bias, i_h, i_g, i_t, end, G, N, A, W, L, R, RP, HAS_BIAS_B
        )  # fmt: skip
    put_rows(dB_rows, b_dB, i_h, i_j, H, N, A, W, NQ, L, R, RP)

    b_dC = product(b_dy, b_S, tl.zeros((L * RP, NQ), tl.float32)) * b_into[:, None]
    b_dC = product(b_Q, b_B, b_dC)
    if A > 0:
        b_dC, b_dphi_C = turned_back(
            b_dC, b_cos, b_sin, C, C_bias, i_h, i_g, i_t, end, G, N, A, W, L, R, RP, HAS_BIAS_C
        )  # fmt: skip
        b_dphi += b_dphi_C
    put_rows(dC_rows, b_dC, i_h, i_j, H, N, A, W, NQ, L, R, RP)
    if A > 0:
        o_a, o_r = tl.arange(0, W), o_row % RP
        p_dphi = dphi_rows + (i_j.to(tl.int64) * H + i_h) * (L * R * A) + ((o_l * R + o_r)[:, None] * A + o_a[None, :])
        b_dphi = tl.reshape(b_dphi, (L * RP, W)).to(dphi_rows.dtype.element_ty)
        tl.store(p_dphi, b_dphi, mask=(o_r < R)[:, None] & (o_a < A)[None, :])
        b_S1, b_S2 = pairs(S + slot, o_p, A, W, P, N)
        b_dS1, b_dS2 = pairs(dS + slot, o_p, A, W, P, N)
        b_turning = b_S1.to(tl.float32) * b_dS2.to(tl.float32) - b_S2.to(tl.float32) * b_dS1.to(tl.float32)
        p_turning = turning + (i_c.to(tl.int64) * H + i_h) * A + o_a
        tl.store(p_turning, tl.sum(b_turning, axis=0), mask=o_a < A)
