# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The rest of the state after a sequence: its last token's B, with bias and rotated by the final angle, and its x."""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import TURNS_PER_RADIAN, cos_sin


@triton.jit
def last_token_kernel(
    x, B, B_bias, phi, sequences, B_prev, x_prev, x_row,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, N: tl.constexpr,
    A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, HAS_BIAS_B: tl.constexpr,
):  # fmt: skip
    """One program a (head, sequence): B_prev [s, r, h, n], x_prev [s, h, p]."""
    i_h, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_t = tl.load(sequences + i_s * 4 + 3).to(tl.int64) - 1
    i_g = i_h // (H // G)
    o_p, o_a, o_u = tl.arange(0, PP), tl.arange(0, AP), tl.arange(0, UP)
    m_a, m_u = o_a < A, o_u < N - 2 * A
    b_x = tl.load(x + i_t * x_row + i_h * P + o_p, mask=o_p < P)
    tl.store(x_prev + (i_s * H + i_h) * P + o_p, b_x, mask=o_p < P)

    b_phi = tl.load(phi + (i_s * H + i_h) * A + o_a, mask=m_a, other=0.0)
    b_cos, b_sin = cos_sin(b_phi * TURNS_PER_RADIAN, False)
    for i_r in tl.static_range(R):
        p_B = B + ((i_t * R + i_r) * G + i_g) * N
        b_1 = tl.load(p_B + o_a, mask=m_a, other=0.0).to(tl.float32)
        b_2 = tl.load(p_B + A + o_a, mask=m_a, other=0.0).to(tl.float32)
        b_3 = tl.load(p_B + 2 * A + o_u, mask=m_u, other=0.0).to(tl.float32)
        if HAS_BIAS_B:
            p_bias = B_bias + (i_h * R + i_r) * N
            b_1 += tl.load(p_bias + o_a, mask=m_a, other=0.0)
            b_2 += tl.load(p_bias + A + o_a, mask=m_a, other=0.0)
            b_3 += tl.load(p_bias + 2 * A + o_u, mask=m_u, other=0.0)
        p_out = B_prev + ((i_s * R + i_r) * H + i_h) * N
        dtype = B_prev.dtype.element_ty
        tl.store(p_out + o_a, (b_1 * b_cos - b_2 * b_sin).to(dtype), mask=m_a)
        tl.store(p_out + A + o_a, (b_1 * b_sin + b_2 * b_cos).to(dtype), mask=m_a)
        tl.store(p_out + 2 * A + o_u, b_3.to(dtype), mask=m_u)
