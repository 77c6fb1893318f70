# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Tiles that several kernels build: angles, rotated B and C, x of each rank, decays between tokens.

Rows of a chunk are (token, rank) with the rank fastest, L tokens times RP ranks (R padded to a power of two):
row // RP is the token, and causality compares tokens. State channels are three tiles: [first halves of the A pairs | second
halves | unrotated U], each padded to a power of two of at least 16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from mamba3.ops.triton.angles import RADIANS_PER_TURN, cos_sin, from_fixed, turned_by, wrapped

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
def load_angles(
    theta, tick, phase, i_h, i_t, end, i_c, T, H: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, L: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """theta [l, a], tick [l] and phase [a] of a chunk, for `row_angles`."""
    o_l, o_a = tl.arange(0, L), tl.arange(0, AP)
    m_l, m_a = i_t + o_l < end, o_a < A
    b_tick = tl.load(tick + (i_h.to(tl.int64) * T + i_t) + o_l, mask=m_l, other=0.0)
    if BULK:
        b_theta = theta.load([i_t, 0])
    else:
        p_theta = theta + i_t.to(tl.int64) * A + (o_l[:, None] * A + o_a[None, :])
        b_theta = tl.load(p_theta, mask=m_l[:, None] & m_a[None, :], other=0.0)
    b_phase = tl.load(phase + (i_c.to(tl.int64) * H + i_h) * A + o_a, mask=m_a, other=0)
    return b_theta, b_tick, b_phase


@triton.jit
def row_angles(
    b_theta, b_tick, b_phase, tokens, AP: tl.constexpr, L: tl.constexpr, RP: tl.constexpr, EXACT: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """cos, sin [l r, a] of phi = phase at the chunk's start + sum_{i <= l} theta_i tick_i, by a triangular product.

    Increments enter the product as two bfloat16 terms, 17 bits together; with EXACT as a coarse and a fine float32 term.
    HARDWARE works in radians and leaves the reduction to the special function unit; otherwise in turns, wrapped first.
    """
    o_l, o_row = tl.arange(0, L), tl.arange(0, L * RP)
    if HARDWARE:
        b_turn = b_theta * b_tick[:, None]  # [l, a]
        b_start = from_fixed(b_phase) * RADIANS_PER_TURN
    else:
        b_turn = turned_by(b_theta, b_tick[:, None], EXACT)
        b_start = from_fixed(b_phase)
    # The second term is always true where it matters; it keeps the mask from living in registers across chunks.
    b_until = tl.where(((o_row // RP)[:, None] >= o_l[None, :]) & (o_l < tokens)[None, :], 1.0, 0.0)
    b_start = tl.broadcast_to(b_start[None, :], (L * RP, AP))
    if EXACT:
        # Multiples of 2^-12 turns add without rounding; what is left is small.
        high = tl.floor(b_turn * 4096.0 + 0.5) * (1.0 / 4096.0)
        b_angle = product(b_until, high.to(tl.float32), tl.zeros((L * RP, AP), tl.float32))
        b_angle = wrapped(b_angle) + product(b_until, (b_turn - high).to(tl.float32), b_start)
    else:
        high = b_turn.to(tl.bfloat16)
        low = (b_turn - high.to(tl.float32)).to(tl.bfloat16)
        b_angle = product(b_until.to(tl.bfloat16), high, b_start)
        b_angle = product(b_until.to(tl.bfloat16), low, b_angle)
    return cos_sin(b_angle, HARDWARE)


@triton.jit
def _load_row_tile(
    v, i_g, i_t, end, first, WIDTH: tl.constexpr, n, G: tl.constexpr, N: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """n channels of v [t, r, g, n] from `first` on, as rows [l r, WIDTH]."""
    o_row, o_n = tl.arange(0, L * RP), tl.arange(0, WIDTH)
    o_l, o_r = o_row // RP, o_row % RP
    if BULK:
        return v.load([i_t * RP, i_g * N + first])
    else:
        m_row = (i_t + o_l < end) & (o_r < R)
        p_v = v + (i_t.to(tl.int64) * (R * G) + i_g) * N + ((o_l * R + o_r)[:, None] * (G * N) + (first + o_n)[None, :])
        return tl.load(p_v, mask=m_row[:, None] & (o_n < n)[None, :], other=0.0)


@triton.jit
def load_rows(
    v, v_rest, i_g, i_t, end, G: tl.constexpr, N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr,
    L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """The three tiles of v [t, r, g, n] as rows: first [l r, a], second [l r, a], unrotated [l r, u]."""
    U: tl.constexpr = N - 2 * A
    b_1 = _load_row_tile(v, i_g, i_t, end, 0, AP, A, G, N, L, R, RP, BULK and A > 0)
    b_2 = _load_row_tile(v, i_g, i_t, end, A, AP, A, G, N, L, R, RP, BULK and A > 0)
    b_3 = _load_row_tile(v_rest, i_g, i_t, end, 2 * A, UP, U, G, N, L, R, RP, BULK and U > 0)
    return b_1, b_2, b_3


@triton.jit
def _biased(
    b_v, bias, i_h, first, WIDTH: tl.constexpr, n, N: tl.constexpr, L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """b_v [l r, n] + bias [h, r, n] in float32."""
    b_v = b_v.to(tl.float32)
    if HAS_BIAS:
        o_n, o_r = tl.arange(0, WIDTH), tl.arange(0, L * RP) % RP
        if RP == 1:
            b_v += tl.load(bias + i_h * N + first + o_n, mask=o_n < n, other=0.0)[None, :]
        else:
            p_bias = bias + i_h * (R * N) + (o_r[:, None] * N + (first + o_n)[None, :])
            b_v += tl.load(p_bias, mask=(o_r < R)[:, None] & (o_n < n)[None, :], other=0.0)
    return b_v


@triton.jit
def rotated(
    b_1, b_2, b_3, bias, b_cos, b_sin, i_h, N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr,
    L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The three tiles of `load_rows` with bias, rotated, in DTYPE."""
    first = _biased(b_1, bias, i_h, 0, AP, A, N, L, R, RP, HAS_BIAS)
    second = _biased(b_2, bias, i_h, A, AP, A, N, L, R, RP, HAS_BIAS)
    rest = _biased(b_3, bias, i_h, 2 * A, UP, N - 2 * A, N, L, R, RP, HAS_BIAS).to(DTYPE)
    return (first * b_cos - second * b_sin).to(DTYPE), (first * b_sin + second * b_cos).to(DTYPE), rest


@triton.jit
def head_rows(
    x, mimo, i_h, i_t, end, row, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, HAS_MIMO: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """x [t, h, p], times mimo [h, r, p] where given, as rows [l r, p] in the dtype of x (float32 with mimo).

    row: elements from one token of x to the next, because x and z are often columns of one projection.
    """
    o_row, o_p = tl.arange(0, L * RP), tl.arange(0, PP)
    o_l, o_r = o_row // RP, o_row % RP
    m_row = (i_t + o_l < end) & (o_r < R)
    if BULK:
        b_x = tl.where(m_row[:, None], x.load([i_t, i_h * P]), 0.0)
    else:
        p_x = x + (i_t.to(tl.int64) * row + i_h * P) + (o_l[:, None] * row + o_p[None, :])
        b_x = tl.load(p_x, mask=m_row[:, None] & (o_p < P)[None, :], other=0.0)
    if HAS_MIMO:
        p_mimo = mimo + i_h * (R * P) + (o_r[:, None] * P + o_p[None, :])
        b_x = b_x.to(tl.float32) * tl.load(p_mimo, mask=(o_r < R)[:, None] & (o_p < P)[None, :], other=0.0)
    return b_x


@triton.jit
def token_row(v, i_h, i_t, end, T, L: tl.constexpr, RP: tl.constexpr):
    """A coefficient [h, t] of each row [l r]; zero past the sequence's end."""
    o_l = tl.arange(0, L * RP) // RP
    return tl.load(v + (i_h.to(tl.int64) * T + i_t) + o_l, mask=i_t + o_l < end, other=0.0)


@triton.jit
def state_tile(S, o_p, o_n, m_n, P: tl.constexpr, N: tl.constexpr):
    """Channels o_n of a state [p, n]; zero outside."""
    return tl.load(S + o_p[:, None] * N + o_n[None, :], mask=(o_p < P)[:, None] & m_n[None, :], other=0.0)


@triton.jit
def put_state_tile(S, b_S, o_p, o_n, m_n, P: tl.constexpr, N: tl.constexpr):
    """The inverse of `state_tile`."""
    p_S = S + o_p[:, None] * N + o_n[None, :]
    tl.store(p_S, b_S.to(S.dtype.element_ty), mask=(o_p < P)[:, None] & m_n[None, :])


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
