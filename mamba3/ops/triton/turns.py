# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The angle of every token and head within its chunk, in fixed point: what the matrix stages rotate B and C by.

    turn_l = sum_{i <= l} theta_i tick_i (from the chunk's start)          turned = turn_L

Kept in 16 bits where the inputs have 16 (2^16 a turn, 5e-5 radians at most from the truth, a hundredth of what rounding B
costs) and in 32 for float32. Two matrix stages read them, and each would otherwise redo a triangular product, its
conversion between layouts and its range reduction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import to_fixed, turned_by


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
