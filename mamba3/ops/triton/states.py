# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Chunk states for the backward pass, in both directions of time, and what passes from segment to segment.

    forward    S(c + 1)  = 2^total_c S(c) + sum_s decay(s -> end) w_s x_s (x) B_s           what enters each chunk
    reverse    dS(c - 1) = 2^total_c dS(c) + sum_t decay(begin -> t) dy_t (x) C_t           the gradient of what leaves it

One recursion: rows v, weighted, times rows of B or C. dy is the gradient of y before the gate.
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
def output_gradient(
    dy, z, mimo_z, mimo_o, i_h, i_t, end, z_row, H: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, HAS_Z: tl.constexpr, HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """The gradient of y before the gate, rows [l r, p] in float32: dy [t, h, p] through the gate, else dy [t, r, h, p]."""
    o_row, o_p = tl.arange(0, L * RP), tl.arange(0, PP)
    o_l, o_r = o_row // RP, o_row % RP
    m_p = o_p < P
    if HAS_Z:
        b_dy = head_rows(dy, dy, i_h, i_t, end, H * P, P, PP, L, R, RP, False, False).to(tl.float32)
        b_z = head_rows(z, mimo_z, i_h, i_t, end, z_row, P, PP, L, R, RP, HAS_MIMO_Z, False).to(tl.float32)
        b_dy *= b_z * sigmoid(b_z, HARDWARE)
        if HAS_MIMO_O:
            p_mimo = mimo_o + i_h * (R * P) + (o_r[:, None] * P + o_p[None, :])
            b_dy *= tl.load(p_mimo, mask=(o_r < R)[:, None] & m_p[None, :], other=0.0)
    else:
        m_row = (i_t + o_l < end) & (o_r < R)
        p_dy = dy + (i_t.to(tl.int64) * (R * H) + i_h) * P + ((o_l * R + o_r)[:, None] * (H * P) + o_p[None, :])
        b_dy = tl.load(p_dy, mask=m_row[:, None] & m_p[None, :], other=0.0).to(tl.float32)
    return b_dy


@triton.jit
def weights_out(
    decay, decay_low, weight, i_h, i_t, end, T, L: tl.constexpr, RP: tl.constexpr, EXACT: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """decay(s -> the chunk's end) and w_s of each row, and 2^total: the decay over the chunk."""
    p_last = i_h.to(tl.int64) * T + tl.minimum(i_t + L, end) - 1
    b_total = tl.load(decay + p_last)
    b_out = b_total - token_row(decay, i_h, i_t, end, T, L, RP)
    if EXACT:
        b_out += tl.load(decay_low + p_last) - token_row(decay_low, i_h, i_t, end, T, L, RP)
    return exp2(b_out, HARDWARE), token_row(weight, i_h, i_t, end, T, L, RP), b_total


@triton.jit
def states_kernel(
    x, z, dy, theta, B, bias, mimo_x, mimo_z, mimo_o, decay, decay_low, weight, tick, phase, segments, sequences,
    S_start, S_each, S_end, total, k_first, c_first, T, x_row, z_row,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MIMO_X: tl.constexpr, HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr, HAS_Z: tl.constexpr,
    EXACT: tl.constexpr, HARDWARE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (head, segment from k_first on). B, bias: those of C where REVERSE.

    SUMMARY: from the zero state to S_end [k, h, p, n] and total [k, h] (HAS_END too); a sequence's last segment of the
    direction is skipped. Otherwise from S_start [k, h, p, n], with the state of each chunk to S_each [c - c_first, h, p, n],
    and, with HAS_END, the state after a sequence's last segment to S_end [s, h, p, n].
    """
    i_h, i_k = tl.program_id(0), k_first + tl.program_id(1)
    begin, end = tl.load(segments + i_k * 5), tl.load(segments + i_k * 5 + 1)
    first_chunk, i_s = tl.load(segments + i_k * 5 + 2), tl.load(segments + i_k * 5 + 3)
    i_g = i_h // (H // G)
    U: tl.constexpr = N - 2 * A
    o_p, o_a, o_u = tl.arange(0, PP), tl.arange(0, AP), tl.arange(0, UP)
    m_a, m_u = o_a < A, o_u < U
    last = begin == tl.load(sequences + i_s * 4 + 2) if REVERSE else tl.load(segments + i_k * 5 + 4) >= 0
    count = tl.cdiv(end - begin, L)
    if SUMMARY:
        count = tl.where(last, 0, count)

    if HAS_START:
        p_start = S_start + (i_k.to(tl.int64) * H + i_h) * (P * N)
        b_S1 = state_tile(p_start, o_p, o_a, m_a, P, N).to(tl.float32)
        b_S2 = state_tile(p_start, o_p, A + o_a, m_a, P, N).to(tl.float32)
        b_S3 = state_tile(p_start, o_p, 2 * A + o_u, m_u, P, N).to(tl.float32)
    else:
        b_S1 = tl.zeros((PP, AP), tl.float32)
        b_S2 = tl.zeros((PP, AP), tl.float32)
        b_S3 = tl.zeros((PP, UP), tl.float32)
    b_sum = 0.0
    for i in tl.range(0, count, num_stages=1):
        i_j = i
        if REVERSE:
            i_j = count - 1 - i
        i_t, i_c = begin + i_j * L, first_chunk + i_j
        if A > 0:
            b_theta, b_tick, b_phase = load_angles(theta, tick, phase, i_h, i_t, end, i_c, T, H, A, AP, L, False)
        b_B1, b_B2, b_B3 = load_rows(B, B, i_g, i_t, end, G, N, A, AP, UP, L, R, RP, False)
        if REVERSE:
            b_v = output_gradient(
                dy, z, mimo_z, mimo_o, i_h, i_t, end, z_row, H, P, PP, L, R, RP, HAS_Z, HAS_MIMO_Z, HAS_MIMO_O, HARDWARE
            )
            b_decay = token_row(decay, i_h, i_t, end, T, L, RP)
            b_total = tl.load(decay + i_h.to(tl.int64) * T + tl.minimum(i_t + L, end) - 1)
            b_v *= exp2(b_decay, HARDWARE)[:, None]
        else:
            b_v = head_rows(x, mimo_x, i_h, i_t, end, x_row, P, PP, L, R, RP, HAS_MIMO_X, False)
            b_out, b_w, b_total = weights_out(decay, decay_low, weight, i_h, i_t, end, T, L, RP, EXACT, HARDWARE)
            b_v *= (b_out * b_w)[:, None]
        if A > 0:
            b_cos, b_sin = row_angles(b_theta, b_tick, b_phase, end - i_t, AP, L, RP, EXACT, HARDWARE)
        else:
            b_cos = tl.zeros((L * RP, AP), tl.float32)
            b_sin = b_cos
        b_B1, b_B2, b_B3 = rotated(b_B1, b_B2, b_B3, bias, b_cos, b_sin, i_h, N, A, AP, UP, L, R, RP, HAS_BIAS, DTYPE)
        if not SUMMARY:
            p_S = S_each + ((i_c - c_first).to(tl.int64) * H + i_h) * (P * N)
            if A > 0:
                put_state_tile(p_S, b_S1, o_p, o_a, m_a, P, N)
                put_state_tile(p_S, b_S2, o_p, A + o_a, m_a, P, N)
            if U > 0:
                put_state_tile(p_S, b_S3, o_p, 2 * A + o_u, m_u, P, N)
        b_v = tl.trans(b_v.to(DTYPE))
        b_keep = exp2(b_total, HARDWARE)
        if A > 0:
            b_S1 = product(b_v, b_B1, b_S1 * b_keep)
            b_S2 = product(b_v, b_B2, b_S2 * b_keep)
        if U > 0:
            b_S3 = product(b_v, b_B3, b_S3 * b_keep)
        b_sum += b_total

    if SUMMARY:
        tl.store(total + i_k * H + i_h, b_sum)
        i_out = tl.where(last, -1, i_k)
    else:
        i_out = tl.where(last, i_s, -1)
    if HAS_END:  # noqa: SIM102  a constant, which one condition would mix with a value
        if i_out >= 0:
            p_end = S_end + (i_out.to(tl.int64) * H + i_h) * (P * N)
            if A > 0:
                put_state_tile(p_end, b_S1, o_p, o_a, m_a, P, N)
                put_state_tile(p_end, b_S2, o_p, A + o_a, m_a, P, N)
            if U > 0:
                put_state_tile(p_end, b_S3, o_p, 2 * A + o_u, m_u, P, N)


@triton.jit
def reverse_merge_kernel(
    S, total, S_final, sequence_segments, H: tl.constexpr, PN: tl.constexpr, BLOCK: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """S [k, h, p n]: what each segment adds to the gradient becomes the gradient of what leaves it, in place.

    One program a (head, sequence, BLOCK channels); S_final [s, h, p n] is the gradient of the sequence's last state.
    """
    i_h, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o = i_b * BLOCK + tl.arange(0, BLOCK)
    m = o < PN
    if HAS_FINAL:
        b_S = tl.load(S_final + (i_s.to(tl.int64) * H + i_h) * PN + o, mask=m, other=0.0)
    else:
        b_S = tl.zeros((BLOCK,), tl.float32)
    first, count = tl.load(sequence_segments + i_s * 2), tl.load(sequence_segments + i_s * 2 + 1)
    for i in tl.range(0, count, num_stages=1):
        i_k = first + count - 1 - i
        p_S = S + (i_k.to(tl.int64) * H + i_h) * PN + o
        more = i_k > first
        b_local = tl.load(p_S, mask=o < tl.where(more, PN, 0), other=0.0)
        tl.store(p_S, b_S, mask=m)
        b_S = b_S * tl.exp2(tl.load(total + i_k * H + i_h, mask=more, other=0.0)) + b_local
