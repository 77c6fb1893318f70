# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The fused pass: chunk after chunk, read the entering state out, add what the chunk itself does, move the state on.

    y_t = decay(0 -> t) C_t S + sum_{s < t} decay(s -> t) w_s (C_t . B_s) x_s + gamma_t (C_t . B_t) x_t + D x_t
    S  <- decay(0 -> L) S + sum_s decay(s -> L) w_s x_s (x) B_s

B and C are rotated by the absolute angle; the state needs no rotation. It stays in registers from a segment's first chunk to
its last. With z, the gate of `mamba3.ops.gate` without norm is applied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import exp2, rounded_product, silu
from mamba3.ops.triton.channels import (
    head_channels,
    of_tokens,
    put_state_tile,
    rank_weights,
    rotated_rows,
    rotation,
    state_tile,
)
from mamba3.ops.triton.tiles import product


# has_state is a value, not a case: a length that is not cut into segments needs no compilation of its own.
@triton.jit(do_not_specialize=["has_state"])
def output_kernel(
    x, z, B, C, B_bias, C_bias, mimo_x, mimo_z, mimo_o, D, decay, decay_low, source, source_low, gamma, turn, phase,
    S_in, has_state, segments, y, S_out, T, x_row, z_row,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, W: tl.constexpr, NQ: tl.constexpr, L: tl.constexpr,
    HAS_BIAS_B: tl.constexpr, HAS_BIAS_C: tl.constexpr, HAS_MIMO_X: tl.constexpr, HAS_MIMO_Z: tl.constexpr,
    HAS_MIMO_O: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    EXACT: tl.constexpr, HARDWARE: tl.constexpr, BULK: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (head, segment). segments [k, 5]: first token, end, first chunk, sequence, where its state goes or -1.

    has_state: whether S_in [k, h, p, n] is read, or the states are zero. T: elements of a row of a coefficient.
    """
    i_h, i_k = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(segments + i_k * 5), tl.load(segments + i_k * 5 + 1)
    first_chunk, i_out = tl.load(segments + i_k * 5 + 2), tl.load(segments + i_k * 5 + 4)
    i_g = i_h // (H // G)
    COARSE: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300, a constant of the kernel beside one of the language
    o_row, o_p = tl.arange(0, L * RP), tl.arange(0, PP)
    o_l = o_row // RP
    rows = tl.where(has_state > 0, P, 0)
    b_S = state_tile(S_in + (i_k.to(tl.int64) * H + i_h) * (P * N), rows, P, PP, N, A, W, NQ)

    for i in tl.range(0, tl.cdiv(end - begin, L), num_stages=STAGES):
        i_t, i_c = begin + i * L, first_chunk + i
        if A > 0:
            b_cos, b_sin = rotation(turn, phase, i_h, i_t, end, i_c, T, H, A, W, L, HARDWARE, BULK)
        else:
            b_cos = tl.zeros((L, 1, W), tl.float32)
            b_sin = b_cos
        b_C = rotated_rows(
            C, C_bias, b_cos, b_sin, i_h, i_g, i_t, end, G, N, A, W, NQ, L, R, RP, HAS_BIAS_C, BULK, DTYPE
        )
        b_B = rotated_rows(
            B, B_bias, b_cos, b_sin, i_h, i_g, i_t, end, G, N, A, W, NQ, L, R, RP, HAS_BIAS_B, BULK, DTYPE
        )
        b_P = product(b_C, tl.trans(b_B), tl.zeros((L * RP, L * RP), tl.float32))
        b_decay = of_tokens(decay, i_h, i_t, end, T, L, RP, BULK)
        b_between = b_decay[:, None] - of_tokens(source, i_h, i_t, end, T, L, RP, BULK)[None, :]
        p_last = i_h.to(tl.int64) * T + tl.minimum(i_t + L, end) - 1
        b_total = tl.load(decay + p_last)
        b_out = b_total - of_tokens(source, i_h, i_t, end, T, L, 1, BULK)
        if EXACT:
            b_between += of_tokens(decay_low, i_h, i_t, end, T, L, RP, BULK)[:, None]
            b_between -= of_tokens(source_low, i_h, i_t, end, T, L, RP, BULK)[None, :]
            b_out += tl.load(decay_low + p_last) - of_tokens(source_low, i_h, i_t, end, T, L, 1, BULK)
        b_weight = exp2(tl.where(o_l[:, None] > o_l[None, :], b_between, float("-inf")), HARDWARE)
        b_gamma = of_tokens(gamma, i_h, i_t, end, T, L, RP, BULK)
        b_P *= tl.where(o_l[:, None] == o_l[None, :], b_gamma[:, None], b_weight)
        if HAS_D:
            b_P += tl.where(o_row[:, None] == o_row[None, :], tl.load(D + i_h), 0.0)
        b_P = b_P.to(DTYPE)

        b_y = product(b_C, tl.trans(b_S.to(DTYPE)), tl.zeros((L * RP, PP), tl.float32))
        if HAS_MIMO_X:
            b_mimo = rank_weights(mimo_x, i_h, P, PP, R, RP)
            b_x = head_channels(x, i_h, i_t, end, x_row, P, PP, L, BULK).to(tl.float32) * b_mimo
        else:
            b_x = head_channels(x, i_h, i_t, end, x_row, P, PP, L, BULK)
            if RP > 1:
                b_x = tl.where(tl.arange(0, RP)[None, :, None] < R, b_x, 0.0)
        b_xr = tl.reshape(b_x.to(DTYPE), (L * RP, PP))
        b_y = product(b_P, b_xr, b_y * exp2(b_decay, HARDWARE)[:, None])
        b_x = tl.reshape((b_x * exp2(b_out, HARDWARE)[:, None, None]).to(DTYPE), (L * RP, PP))
        b_S = product(tl.trans(b_x), b_B, b_S * exp2(b_total, HARDWARE))

        if HAS_Z:
            # Everything of the gate is loaded after the products: their layout is then not forced on it.
            if HAS_MIMO_Z:
                b_mimo_z = rank_weights(mimo_z, i_h, P, PP, R, RP)
            if HAS_MIMO_O:
                b_mimo_o = rank_weights(mimo_o, i_h, P, PP, R, RP)
            b_z = head_channels(z, i_h, i_t, end, z_row, P, PP, L, BULK).to(tl.float32)
            if HAS_MIMO_Z:
                b_z = b_z * b_mimo_z
            b_gate = silu(b_z, HARDWARE, COARSE)
            if HAS_MIMO_O:
                b_gate *= b_mimo_o
            b_y = tl.reshape(b_y, (L, RP, PP))
            if RP > 1:  # noqa: SIM108, the compiler drops the other branch
                b_y = tl.sum(rounded_product(b_y, b_gate, HARDWARE), axis=1)
            else:
                b_y = tl.sum(b_y * b_gate, axis=1)
            o_t = tl.arange(0, L)
            p_y = y + (i_t.to(tl.int64) * H + i_h) * P + (o_t[:, None] * (H * P) + o_p[None, :])
            m_t = i_t + o_t < end
        else:
            o_r = o_row % RP
            p_y = y + (i_t.to(tl.int64) * (R * H) + i_h) * P + ((o_l * R + o_r)[:, None] * (H * P) + o_p[None, :])
            m_t = (i_t + o_l < end) & (o_r < R)
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[:, None] & (o_p < P)[None, :])

    if i_out >= 0:
        put_state_tile(S_out + (i_out.to(tl.int64) * H + i_h) * (P * N), b_S, P, PP, N, A, W, NQ)
