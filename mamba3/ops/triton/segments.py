# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Segments of long sequences: what each does to the state, and the state that enters each (mathematics.md, section 5).

    S_local = sum_s decay(s -> end) w_s x_s (x) B_s            total = log2 of the segment's decay
    S_in(k + 1) = 2^total_k S_in(k) + S_local_k                S_in(first) = state + halo sum_r x_prev_r (x) B_prev_r

B is rotated by the absolute angle, so that the merge rotates nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import exp2
from mamba3.ops.triton.channels import (
    head_channels,
    of_tokens,
    put_state_tile,
    rank_weights,
    rotated_rows,
    rotation,
)
from mamba3.ops.triton.tiles import halo_tile, product


@triton.jit
def summary_kernel(
    x, B, B_bias, mimo_x, decay, decay_low, source, source_low, turn, phase, segments, S, total, T, x_row,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, W: tl.constexpr, NQ: tl.constexpr, L: tl.constexpr,
    HAS_BIAS_B: tl.constexpr, HAS_MIMO_X: tl.constexpr, EXACT: tl.constexpr, HARDWARE: tl.constexpr,
    BULK: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program a (head, segment): S [k, h, p, n] from the zero state, total [k, h]. A sequence's last one is skipped."""
    i_h, i_k = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(segments + i_k * 5), tl.load(segments + i_k * 5 + 1)
    first_chunk = tl.load(segments + i_k * 5 + 2)
    stop = tl.where(tl.load(segments + i_k * 5 + 4) >= 0, begin, end)
    i_g = i_h // (H // G)
    b_S = tl.zeros((PP, NQ), tl.float32)
    b_sum = 0.0
    for i in tl.range(0, tl.cdiv(stop - begin, L), num_stages=STAGES):
        i_t, i_c = begin + i * L, first_chunk + i
        if A > 0:
            b_cos, b_sin = rotation(turn, phase, i_h, i_t, end, i_c, T, H, A, W, L, HARDWARE, BULK)
        else:
            b_cos = tl.zeros((L, 1, W), tl.float32)
            b_sin = b_cos
        b_B = rotated_rows(
            B, B_bias, b_cos, b_sin, i_h, i_g, i_t, end, G, N, A, W, NQ, L, R, RP, HAS_BIAS_B, BULK, DTYPE
        )
        p_last = i_h.to(tl.int64) * T + tl.minimum(i_t + L, end) - 1
        b_total = tl.load(decay + p_last)
        b_out = b_total - of_tokens(source, i_h, i_t, end, T, L, 1, BULK)
        if EXACT:
            b_out += tl.load(decay_low + p_last) - of_tokens(source_low, i_h, i_t, end, T, L, 1, BULK)
        if HAS_MIMO_X:
            b_mimo = rank_weights(mimo_x, i_h, P, PP, R, RP)
            b_x = head_channels(x, i_h, i_t, end, x_row, P, PP, L, BULK).to(tl.float32) * b_mimo
        else:
            b_x = head_channels(x, i_h, i_t, end, x_row, P, PP, L, BULK)
            if RP > 1:
                b_x = tl.where(tl.arange(0, RP)[None, :, None] < R, b_x, 0.0)
        b_x = tl.reshape((b_x * exp2(b_out, HARDWARE)[:, None, None]).to(DTYPE), (L * RP, PP))
        b_S = product(tl.trans(b_x), b_B, b_S * exp2(b_total, HARDWARE))
        b_sum += b_total

    if stop > begin:
        put_state_tile(S + (i_k.to(tl.int64) * H + i_h) * (P * N), b_S, P, PP, N, A, W, NQ)
        tl.store(total + i_k * H + i_h, b_sum)


@triton.jit
def merge_kernel(
    S, total, S_state, x_prev, B_prev, mimo_x, dt, lam, sequences, sequence_segments,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PB: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_MIMO_X: tl.constexpr,
):  # fmt: skip
    """S [k, h, p, n]: what each segment adds becomes what enters it, in place.

    One program a (head, sequence, PB channels). sequence_segments [s, 2]: first segment, segments.
    """
    i_h, i_s, i_p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_p, o_n = i_p * PB + tl.arange(0, PB), tl.arange(0, NP)
    m = (o_p < P)[:, None] & (o_n < N)[None, :]
    o_pn = o_p[:, None] * N + o_n[None, :]
    if HAS_STATE:
        b_S = tl.load(S_state + (i_s * H + i_h) * (P * N) + o_pn, mask=m, other=0.0).to(tl.float32)
        i_t = tl.load(sequences + i_s * 4 + 2).to(tl.int64)
        b_halo = (1.0 - tl.load(lam + i_t * H + i_h)) * tl.load(dt + i_t * H + i_h)
        b_S += b_halo * halo_tile(x_prev, B_prev, mimo_x, i_s, i_h, o_p, o_n, H, P, N, R, HAS_MIMO_X)
    else:
        b_S = tl.zeros((PB, NP), tl.float32)
    first, count = tl.load(sequence_segments + i_s * 2), tl.load(sequence_segments + i_s * 2 + 1)
    for i in range(0, count):
        i_k = first + i
        p_S = S + (i_k.to(tl.int64) * H + i_h) * (P * N) + o_pn
        last = i == count - 1
        b_local = tl.load(p_S, mask=m & (not last), other=0.0)
        tl.store(p_S, b_S, mask=m)
        b_S = b_S * tl.exp2(tl.load(total + i_k * H + i_h, mask=not last, other=0.0)) + b_local
