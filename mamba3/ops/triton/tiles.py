# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""What several kernels do with tiles: products, sums over rows by products, the halo of a given state.

Rows of a chunk are (token, rank) with the rank fastest, L tokens times RP ranks (R padded to a power of two):
row // RP is the token, and causality compares tokens. `channels` has the columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Triton's CPU interpreter (3.9) multiplies the bit patterns of bfloat16 matrices.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def product(a, b, acc):
    """acc + a b, in float32; float32 operands are not rounded, and 16-bit ones need not be."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def pinned(v, HARDWARE: tl.constexpr):
    """A tile, of 16 or 32 bits, which the compiler then makes once. Where it is wanted in several layouts, the compiler would
    rather repeat all that leads to it, special functions included, than exchange it between threads."""
    if HARDWARE:
        PACK: tl.constexpr = 32 // v.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], v.dtype, is_pure=False, pack=PACK)
    else:
        return v


@triton.jit
def token_sums(b_v, WIDTH: tl.constexpr, L: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Rows [l r, n] in DTYPE to [r padded to at least 16, n] in float32, summed over tokens: by a product with ones, because
    a sum across threads takes several times as many instructions."""
    RANKS: tl.constexpr = RP if RP > 16 else 16
    o_r, o_row = tl.arange(0, RANKS), tl.arange(0, L * RP)
    b_ones = tl.where(o_r[:, None] == (o_row % RP)[None, :], 1.0, 0.0).to(DTYPE)
    return product(b_ones, b_v, tl.zeros((RANKS, WIDTH), tl.float32))


@triton.jit
def rank_sums(b_v, WIDTH: tl.constexpr, L: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr):
    """Rows [l r, n] in DTYPE to [l padded to at least 16, n] in float32, summed over ranks; as `token_sums`."""
    TOKENS: tl.constexpr = L if L > 16 else 16
    o_l, o_row = tl.arange(0, TOKENS), tl.arange(0, L * RP)
    b_ones = tl.where(o_l[:, None] == (o_row // RP)[None, :], 1.0, 0.0).to(DTYPE)
    return product(b_ones, b_v, tl.zeros((TOKENS, WIDTH), tl.float32))


@triton.jit
def halo_tile(
    x_prev, B_prev, mimo, i_s, i_h, o_p, o_n, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    HAS_MIMO: tl.constexpr,
):  # fmt: skip
    """sum_r x_prev_r (x) B_prev_r [p, n] of sequence i_s (int64): what its first token's halo weighs."""
    b_x = tl.load(x_prev + (i_s * H + i_h) * P + o_p, mask=o_p < P, other=0.0).to(tl.float32)
    b_sum = tl.zeros((o_p.shape[0], o_n.shape[0]), tl.float32)
    for i_r in tl.static_range(R):
        b_B = tl.load(B_prev + ((i_s * R + i_r) * H + i_h) * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        b_xr = b_x
        if HAS_MIMO:
            b_xr = b_x * tl.load(mimo + (i_h * R + i_r) * P + o_p, mask=o_p < P, other=0.0)
        b_sum += b_xr[:, None] * b_B[None, :]
    return b_sum
