# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Chunk states for the backward pass, in both directions of time, and what passes from segment to segment.

    forward    S(c + 1)  = 2^total_c S(c) + sum_s decay(s -> end) w_s x_s (x) B_s           what enters each chunk
    reverse    dS(c - 1) = 2^total_c dS(c) + sum_t decay(begin -> t) dy_t (x) C_t           the gradient of what leaves it

One recursion: rows v, weighted, times rows of B or C. dy is the gradient of y before the gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import exp2, silu
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


@triton.jit
def ranked_channels(
    x, mimo, i_h, i_t, end, row, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HAS_MIMO: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """x [t, h, p] of a chunk for each rank, times mimo [h, r, p] where given: [l, r, p], in float32 with mimo."""
    b_x = head_channels(x, i_h, i_t, end, row, P, PP, L, BULK)
    if HAS_MIMO:
        b_x = b_x.to(tl.float32) * rank_weights(mimo, i_h, P, PP, R, RP)
    elif RP > 1:
        b_x = tl.where(tl.arange(0, RP)[None, :, None] < R, b_x, 0.0)
    return b_x


@triton.jit
def ranked_rows(
    x, mimo, i_h, i_t, end, row, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HAS_MIMO: tl.constexpr, BULK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`ranked_channels` as rows [l r, p] in DTYPE. One rank as it is loaded: the compiler multiplies loads where they are."""
    if RP == 1 and not HAS_MIMO and not BULK:
        o_l, o_p = tl.arange(0, L), tl.arange(0, PP)
        p_x = x + (i_t.to(tl.int64) * row + i_h * P) + (o_l[:, None] * row + o_p[None, :])
        return tl.load(p_x, mask=(i_t + o_l < end)[:, None] & (o_p < P)[None, :], other=0.0)
    else:
        b_x = ranked_channels(x, mimo, i_h, i_t, end, row, P, PP, L, R, RP, HAS_MIMO, BULK)
        return tl.reshape(b_x.to(DTYPE), (L * RP, PP))


@triton.jit
def output_gradient(
    dy, z, mimo_z, mimo_o, i_h, i_t, end, z_row, H: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, HAS_Z: tl.constexpr, HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr,
    HARDWARE: tl.constexpr, BULK: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """The gradient of y before the gate, [l, r, p] in float32: dy [t, h, p] through the gate, else dy [t, r, h, p]."""
    if HAS_Z:
        b_z = ranked_channels(z, mimo_z, i_h, i_t, end, z_row, P, PP, L, R, RP, HAS_MIMO_Z, BULK).to(tl.float32)
        b_dy = head_channels(dy, i_h, i_t, end, H * P, P, PP, L, BULK).to(tl.float32) * silu(b_z, HARDWARE, COARSE)
        if HAS_MIMO_O:
            b_dy *= rank_weights(mimo_o, i_h, P, PP, R, RP)
    else:
        o_l, o_r, o_p = tl.arange(0, L)[:, None, None], tl.arange(0, RP)[None, :, None], tl.arange(0, PP)[None, None, :]
        p_dy = dy + (i_t.to(tl.int64) * (R * H) + i_h) * P + ((o_l * R + o_r) * (H * P) + o_p)
        b_dy = tl.load(p_dy, mask=(i_t + o_l < end) & (o_r < R) & (o_p < P), other=0.0).to(tl.float32)
    return b_dy


@triton.jit
def decay_out(
    decay, decay_low, i_h, i_t, end, T, L: tl.constexpr, RP: tl.constexpr, BULK: tl.constexpr, EXACT: tl.constexpr
):
    """log2 of decay(s -> the chunk's end) of each row, and of the decay over the chunk."""
    p_last = i_h.to(tl.int64) * T + tl.minimum(i_t + L, end) - 1
    b_total = tl.load(decay + p_last)
    b_out = b_total - of_tokens(decay, i_h, i_t, end, T, L, RP, BULK)
    if EXACT:
        b_out += tl.load(decay_low + p_last) - of_tokens(decay_low, i_h, i_t, end, T, L, RP, BULK)
    return b_out, b_total


# has_start is a value, not a case, as in `output_kernel`.
@triton.jit(do_not_specialize=["c_first", "k_first", "has_start"])
def states_kernel(
    x, z, dy, B, bias, mimo_x, mimo_z, mimo_o, decay, decay_low, weight, turn, phase, segments, sequences,
    S_start, has_start, S_each, S_end, total, k_first, c_first, T, x_row, z_row,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, W: tl.constexpr, NQ: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr, HAS_END: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MIMO_X: tl.constexpr, HAS_MIMO_Z: tl.constexpr, HAS_MIMO_O: tl.constexpr, HAS_Z: tl.constexpr,
    EXACT: tl.constexpr, HARDWARE: tl.constexpr, BULK: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (head, segment from k_first on). B, bias: those of C where REVERSE.

    SUMMARY: from the zero state to S_end [k, h, p, n] and total [k, h] (HAS_END too); a sequence's last segment of the
    direction is skipped. Otherwise from S_start [k, h, p, n], or from zero unless has_start, with its states in the order of
    time in S_each [slot, h, p, n]: a segment of m chunks has m + 1 slots, the last of which is empty going forward. With
    HAS_END the state after a sequence's last segment of the direction goes to S_end [s, h, p, n].
    """
    i_h, i_k = tl.program_id(0), k_first + tl.program_id(1)
    begin, end = tl.load(segments + i_k * 5), tl.load(segments + i_k * 5 + 1)
    first_chunk, i_s = tl.load(segments + i_k * 5 + 2), tl.load(segments + i_k * 5 + 3)
    i_g = i_h // (H // G)
    COARSE: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300, a constant of the kernel beside one of the language
    last = begin == tl.load(sequences + i_s * 4 + 2) if REVERSE else tl.load(segments + i_k * 5 + 4) >= 0
    count = tl.cdiv(end - begin, L)
    if SUMMARY:
        count = tl.where(last, 0, count)
    else:
        slots = S_each + ((first_chunk - c_first + i_k - k_first).to(tl.int64) * H + i_h) * (P * N)

    if SUMMARY:
        b_S = tl.zeros((PP, NQ), tl.float32)
    else:
        rows = tl.where(has_start > 0, P, 0)
        b_S = state_tile(S_start + (i_k.to(tl.int64) * H + i_h) * (P * N), rows, P, PP, N, A, W, NQ)
    b_sum = 0.0
    for i in tl.range(0, count, num_stages=STAGES):
        i_j = i
        if REVERSE:
            i_j = count - 1 - i
        i_t, i_c = begin + i_j * L, first_chunk + i_j
        if A > 0:
            b_cos, b_sin = rotation(turn, phase, i_h, i_t, end, i_c, T, H, A, W, L, HARDWARE, BULK)
        else:
            b_cos = tl.zeros((L, 1, W), tl.float32)
            b_sin = b_cos
        b_B = rotated_rows(B, bias, b_cos, b_sin, i_h, i_g, i_t, end, G, N, A, W, NQ, L, R, RP, HAS_BIAS, BULK, DTYPE)
        b_out, b_total = decay_out(decay, decay_low, i_h, i_t, end, T, L, 1, BULK, EXACT)
        if REVERSE:
            b_v = output_gradient(
                dy, z, mimo_z, mimo_o, i_h, i_t, end, z_row, H, P, PP, L, R, RP, HAS_Z, HAS_MIMO_Z, HAS_MIMO_O, HARDWARE,
                BULK, COARSE,
            )  # fmt: skip
            b_v *= exp2(of_tokens(decay, i_h, i_t, end, T, L, 1, BULK), HARDWARE)[:, None, None]
        else:
            b_v = ranked_channels(x, mimo_x, i_h, i_t, end, x_row, P, PP, L, R, RP, HAS_MIMO_X, BULK)
            b_out = exp2(b_out, HARDWARE) * of_tokens(weight, i_h, i_t, end, T, L, 1, BULK)
            b_v *= b_out[:, None, None]
        if not SUMMARY:
            slot = i_j + 1 if REVERSE else i_j
            put_state_tile(slots + slot.to(tl.int64) * (H * P * N), b_S, P, PP, N, A, W, NQ)
        b_v = tl.reshape(b_v.to(DTYPE), (L * RP, PP))
        b_S = product(tl.trans(b_v), b_B, b_S * exp2(b_total, HARDWARE))
        b_sum += b_total

    if SUMMARY:
        tl.store(total + i_k * H + i_h, b_sum)
        i_out = tl.where(last, -1, i_k)
    else:
        if REVERSE:
            put_state_tile(slots, b_S, P, PP, N, A, W, NQ)
        i_out = tl.where(last, i_s, -1)
    if HAS_END:  # noqa: SIM102  a constant, which one condition would mix with a value
        if i_out >= 0:
            put_state_tile(S_end + (i_out.to(tl.int64) * H + i_h) * (P * N), b_S, P, PP, N, A, W, NQ)


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
