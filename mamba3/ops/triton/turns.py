# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The angle of every token and head within its chunk, in fixed point: what the matrix stages rotate B and C by.

    turn_l = sum_{i <= l} theta_i tick_i (from the chunk's start)          turned = turn_L
    phase = phi_in + the exclusive sum of turned over a sequence's chunks

Kept in 16 bits where the inputs have 16 (2^16 a turn, 5e-5 radians at most from the truth, a hundredth of what rounding B
costs) and in 32 for float32. Two matrix stages read them, and each would otherwise redo a triangular product, its
conversion between layouts and its range reduction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import RADIANS_PER_TURN, TURNS_PER_RADIAN, from_fixed, to_fixed, turned_by, wrapped


@triton.jit
def turns_kernel(
    theta, tick_bth, chunks, turn, turned, T,
    H: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, L: tl.constexpr, LB: tl.constexpr, HB: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """turn [h, t, a], turned [c, h, a] int32. One program a (chunk, HB heads); LB tokens are loaded at a time."""
    i_c, i_hb = tl.program_id(0), tl.program_id(1)
    i_t, end = tl.load(chunks + i_c * 2), tl.load(chunks + i_c * 2 + 1)
    o_h, o_a = i_hb * HB + tl.arange(0, HB), tl.arange(0, AP)
    p_theta = theta + i_t.to(tl.int64) * A + o_a
    p_tick = tick_bth + i_t.to(tl.int64) * H + o_h
    p_turn = turn + i_t.to(tl.int64) * A + (o_h.to(tl.int64)[:, None] * T * A + o_a[None, :])
    b_sum = tl.zeros((HB, AP), tl.int32)
    for i in range(0, L, LB):
        for j in tl.static_range(LB):
            # Past the sequence's end nothing is read, and nothing turns.
            n_a, n_h = tl.where(i_t + i + j < end, A, 0), tl.where(i_t + i + j < end, H, 0)
            b_theta = tl.load(p_theta + (i + j) * A, mask=o_a < n_a, other=0.0)
            b_tick = tl.load(p_tick + (i + j) * H, mask=o_h < n_h, other=0.0)
            b_sum += to_fixed(turned_by(b_theta[None, :], b_tick[:, None], EXACT))  # [h, a]
            if EXACT:  # noqa: SIM108, the compiler drops the other branch
                b_turn = b_sum
            else:
                b_turn = ((b_sum + 32768) >> 16).to(tl.int16)
            tl.store(p_turn + (i + j) * A, b_turn, mask=(o_h < H)[:, None] & (o_a < n_a)[None, :])
    tl.store(
        turned + i_c.to(tl.int64) * (H * A) + (o_h[:, None] * A + o_a[None, :]),
        b_sum,
        mask=(o_h < H)[:, None] & (o_a < A)[None, :],
    )


@triton.jit
def phases_kernel(
    turned, phi_in, sequences, phi_out, HA: tl.constexpr, CB: tl.constexpr, BLOCK: tl.constexpr, HAS_PHI: tl.constexpr
):
    """turned [c, h a] becomes the phase at each chunk's start, in place; phi_in, phi_out [s, h a] in radians.

    One program a (sequence, BLOCK angles). sequences [s, 4]: first chunk, chunks, first token, end.
    """
    i_s, i_b = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(sequences + i_s * 4), tl.load(sequences + i_s * 4 + 1)
    o_c, o_j = tl.arange(0, CB), i_b * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < HA
    p_phi = i_s.to(tl.int64) * HA + o_j
    if HAS_PHI:
        b_start = to_fixed(wrapped(tl.load(phi_in + p_phi, mask=m_j, other=0.0).to(tl.float32) * TURNS_PER_RADIAN))
    else:
        b_start = tl.zeros((BLOCK,), tl.int32)
    for i_c in range(0, count, CB):
        p_turned = turned + (first + i_c).to(tl.int64) * HA + (o_c[:, None] * HA + o_j[None, :])
        m = (i_c + o_c < count)[:, None] & m_j[None, :]
        b_turned = tl.load(p_turned, mask=m, other=0)
        b_sum = tl.cumsum(b_turned, axis=0)
        tl.store(p_turned, b_start[None, :] + b_sum - b_turned, mask=m)
        b_start += tl.sum(b_turned, axis=0)
    tl.store(phi_out + p_phi, from_fixed(b_start) * RADIANS_PER_TURN, mask=m_j)
