# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The fused pass: chunk after chunk, read the entering state out, add what the chunk itself does, move the state on.

    y_t = decay(0 -> t) C_t S + sum_{s < t} decay(s -> t) w_s (C_t . B_s) x_s + gamma_t (C_t . B_t) x_t + D x_t
    S  <- decay(0 -> L) S + sum_s decay(s -> L) w_s x_s (x) B_s

B and C are rotated by the absolute angle, of which memory holds one value a chunk; the state needs no rotation. It stays in
registers from a segment's first chunk to its last. With z, the gate of `mamba3.ops.gate` without norm is applied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import exp2, sigmoid
from mamba3.ops.triton.tiles import (
    head_rows,
    load_angles,
    load_rows,
    product,
    put_state_tile,
    rotated,
    row_angles,
    state_tile,
    token_row,
)


@triton.jit
def gated(
    b_y, b_z, mimo_o, i_h, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, HAS_MIMO_O: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """sum_r mimo_o_r * y_r * silu(z_r): rows [l r, p] to [l, p]."""
    b_z = b_z.to(tl.float32)
    b_o = b_y * b_z * sigmoid(b_z, HARDWARE)
    if HAS_MIMO_O:
        o_r, o_p = tl.arange(0, L * RP) % RP, tl.arange(0, PP)
        m_mimo = (o_r < R)[:, None] & (o_p < P)[None, :]
        b_o *= tl.load(mimo_o + i_h * (R * P) + (o_r[:, None] * P + o_p[None, :]), mask=m_mimo, other=0.0)
    if RP > 1:
        b_o = tl.sum(tl.reshape(b_o, (L, RP, PP)), axis=1)
    return b_o


@triton.jit
def output_kernel(
    x, z, theta, B, B_rest, C, C_rest, B_bias, C_bias, mimo_x, mimo_z, mimo_o, D,
    decay, decay_low, source, source_low, gamma, tick, phase,
    S_in, segments, y, S_out, T, x_row, z_row,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr,
    HAS_BIAS_B: tl.constexpr, HAS_BIAS_C: tl.constexpr, HAS_MIMO_X: tl.constexpr, HAS_MIMO_Z: tl.constexpr,
    HAS_MIMO_O: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_S: tl.constexpr,
    EXACT: tl.constexpr, HARDWARE: tl.constexpr, BULK: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (head, segment). segments [k, 5]: first token, end, first chunk, sequence, where its state goes or -1."""
    i_h, i_k = tl.program_id(0), tl.program_id(1)
    begin = tl.load(segments + i_k * 5)
    end = tl.load(segments + i_k * 5 + 1)
    first_chunk = tl.load(segments + i_k * 5 + 2)
    i_out = tl.load(segments + i_k * 5 + 4)
    i_g = i_h // (H // G)

    o_row, o_p, o_a, o_u = tl.arange(0, L * RP), tl.arange(0, PP), tl.arange(0, AP), tl.arange(0, UP)
    o_l = o_row // RP
    before = o_l[:, None] > o_l[None, :]
    same = o_l[:, None] == o_l[None, :]
    m_a, m_u = o_a < A, o_u < N - 2 * A
    U: tl.constexpr = N - 2 * A

    if HAS_D:
        b_D = tl.load(D + i_h)
    if HAS_S:
        p_S = S_in + (i_k.to(tl.int64) * H + i_h) * P * N
        b_S1 = state_tile(p_S, o_p, o_a, m_a, P, N)
        b_S2 = state_tile(p_S, o_p, A + o_a, m_a, P, N)
        b_S3 = state_tile(p_S, o_p, 2 * A + o_u, m_u, P, N)
    else:
        b_S1 = tl.zeros((PP, AP), tl.float32)
        b_S2 = tl.zeros((PP, AP), tl.float32)
        b_S3 = tl.zeros((PP, UP), tl.float32)

    for i in tl.range(0, tl.cdiv(end - begin, L), num_stages=STAGES):
        i_t, i_c = begin + i * L, first_chunk + i
        if A > 0:
            b_theta, b_tick, b_phase = load_angles(theta, tick, phase, i_h, i_t, end, i_c, T, H, A, AP, L, BULK)
        b_B1, b_B2, b_B3 = load_rows(B, B_rest, i_g, i_t, end, G, N, A, AP, UP, L, R, RP, BULK)
        b_C1, b_C2, b_C3 = load_rows(C, C_rest, i_g, i_t, end, G, N, A, AP, UP, L, R, RP, BULK)
        b_decay = token_row(decay, i_h, i_t, end, T, L, RP)
        b_source = token_row(source, i_h, i_t, end, T, L, RP)
        b_gamma = token_row(gamma, i_h, i_t, end, T, L, RP)
        p_last = i_h.to(tl.int64) * T + tl.minimum(i_t + L, end) - 1
        b_total = tl.load(decay + p_last)
        b_between = b_decay[:, None] - b_source[None, :]
        b_out = b_total - b_source
        if EXACT:
            b_source_low = token_row(source_low, i_h, i_t, end, T, L, RP)
            b_between += token_row(decay_low, i_h, i_t, end, T, L, RP)[:, None] - b_source_low[None, :]
            b_out += tl.load(decay_low + p_last) - b_source_low

        if A > 0:
            b_cos, b_sin = row_angles(b_theta, b_tick, b_phase, end - i_t, AP, L, RP, EXACT, HARDWARE)
        else:
            b_cos = tl.zeros((L * RP, AP), tl.float32)
            b_sin = b_cos
        b_B1, b_B2, b_B3 = rotated(
            b_B1, b_B2, b_B3, B_bias, b_cos, b_sin, i_h, N, A, AP, UP, L, R, RP, HAS_BIAS_B, DTYPE
        )
        b_x = head_rows(x, mimo_x, i_h, i_t, end, x_row, P, PP, L, R, RP, HAS_MIMO_X, BULK and RP == 1)
        b_C1, b_C2, b_C3 = rotated(
            b_C1, b_C2, b_C3, C_bias, b_cos, b_sin, i_h, N, A, AP, UP, L, R, RP, HAS_BIAS_C, DTYPE
        )
        b_P = tl.zeros((L * RP, L * RP), tl.float32)
        if A > 0:
            b_P = product(b_C1, tl.trans(b_B1), b_P)
            b_P = product(b_C2, tl.trans(b_B2), b_P)
        if U > 0:
            b_P = product(b_C3, tl.trans(b_B3), b_P)
        b_weight = exp2(tl.where(before, b_between, float("-inf")), HARDWARE)
        b_P *= tl.where(same, b_gamma[:, None], b_weight)
        if HAS_D:
            b_P += tl.where(o_row[:, None] == o_row[None, :], b_D, 0.0)

        if HAS_Z:
            b_z = head_rows(z, mimo_z, i_h, i_t, end, z_row, P, PP, L, R, RP, HAS_MIMO_Z, BULK and RP == 1)
        b_y = tl.zeros((L * RP, PP), tl.float32)
        if A > 0:
            b_y = product(b_C1, tl.trans(b_S1.to(DTYPE)), b_y)
            b_y = product(b_C2, tl.trans(b_S2.to(DTYPE)), b_y)
        if U > 0:
            b_y = product(b_C3, tl.trans(b_S3.to(DTYPE)), b_y)
        b_y *= exp2(b_decay, HARDWARE)[:, None]
        b_y = product(b_P.to(DTYPE), b_x.to(DTYPE), b_y)

        b_x = tl.trans((b_x * exp2(b_out, HARDWARE)[:, None]).to(DTYPE))
        b_keep = exp2(b_total, HARDWARE)
        if A > 0:
            b_S1 = product(b_x, b_B1, b_S1 * b_keep)
            b_S2 = product(b_x, b_B2, b_S2 * b_keep)
        if U > 0:
            b_S3 = product(b_x, b_B3, b_S3 * b_keep)

        if HAS_Z:
            b_y = gated(b_y, b_z, mimo_o, i_h, P, PP, L, R, RP, HAS_MIMO_O, HARDWARE)
            o_token = tl.arange(0, L)
            p_y = y + (i_t.to(tl.int64) * H + i_h) * P + (o_token[:, None] * (H * P) + o_p[None, :])
            m_token = i_t + o_token < end
        else:
            o_r = o_row % RP
            p_y = y + (i_t.to(tl.int64) * (R * H) + i_h) * P + ((o_l * R + o_r)[:, None] * (H * P) + o_p[None, :])
            m_token = (i_t + o_l < end) & (o_r < R)
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_token[:, None] & (o_p < P)[None, :])

    if i_out >= 0:
        p_S = S_out + (i_out.to(tl.int64) * H + i_h) * P * N
        if A > 0:
            put_state_tile(p_S, b_S1, o_p, o_a, m_a, P, N)
            put_state_tile(p_S, b_S2, o_p, A + o_a, m_a, P, N)
        if U > 0:
            put_state_tile(p_S, b_S3, o_p, 2 * A + o_u, m_u, P, N)
