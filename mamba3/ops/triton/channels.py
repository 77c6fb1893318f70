# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The state's channels as the forward kernels hold them: pieces of W side by side in one tile, for one product each.

    [first halves of the A pairs | second halves | unrotated, first W | unrotated, rest]        W >= A, 2 W >= U = N - 2 A

Without rotated or without unrotated channels there are two pieces. A piece is loaded by itself, so that a thread holds both
halves of a pair; joining pieces moves no data. Products over separate pieces would each be waited for: one of 128 channels
instead of three took a tenth off the fused pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.ops.triton.angles import RADIANS_PER_TURN, cos_sin, from_fixed


@triton.jit
def columns(N: tl.constexpr, A: tl.constexpr, W: tl.constexpr, NQ: tl.constexpr):
    """The channel in each column of a tile, and which columns hold one."""
    o_q = tl.arange(0, NQ)
    U: tl.constexpr = N - 2 * A
    if N == NQ and (A == 0 or A == W):
        o_n = o_q
        m_n = o_q < N
    else:
        o_w = o_q % W
        o_u = o_q - (2 * W if A > 0 else 0)
        paired = o_u < 0 if U > 0 else o_q >= 0
        o_n = tl.where(paired, o_q // W * A + o_w, 2 * A + o_u)
        m_n = tl.where(paired, o_w < A, o_u < U)
    return o_n, m_n


@triton.jit
def state_tile(
    S, rows, P: tl.constexpr, PP: tl.constexpr, N: tl.constexpr, A: tl.constexpr, W: tl.constexpr, NQ: tl.constexpr
):
    """A state [p, n] as a tile; zero where there is no channel, and from row `rows` on."""
    o_p = tl.arange(0, PP)
    o_n, m_n = columns(N, A, W, NQ)
    return tl.load(S + o_p[:, None] * N + o_n[None, :], mask=(o_p < rows)[:, None] & m_n[None, :], other=0.0)


@triton.jit
def put_state_tile(
    S, b_S, P: tl.constexpr, PP: tl.constexpr, N: tl.constexpr, A: tl.constexpr, W: tl.constexpr, NQ: tl.constexpr
):
    """The inverse of `state_tile`."""
    o_p = tl.arange(0, PP)
    o_n, m_n = columns(N, A, W, NQ)
    tl.store(S + o_p[:, None] * N + o_n[None, :], b_S, mask=(o_p < P)[:, None] & m_n[None, :])


@triton.jit
def rotation(
    turn, phase, i_h, i_t, end, i_c, T, H: tl.constexpr, A: tl.constexpr, W: tl.constexpr, L: tl.constexpr,
    HARDWARE: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """cos, sin [l, 1, W] of a chunk's tokens, from `turn` [h, t, a] and the phase [c, h, a] at the chunk's start."""
    o_l, o_a = tl.arange(0, L)[:, None, None], tl.arange(0, W)[None, None, :]
    b_phase = tl.load(phase + (i_c.to(tl.int64) * H + i_h) * A + o_a, mask=o_a < A, other=0)
    if BULK:
        b_turn = tl.reshape(turn.load([i_h * T + i_t, 0]), (L, 1, W))
        b_turn = b_turn.to(tl.int32) << 16
    else:
        p_turn = turn + (i_h.to(tl.int64) * T + i_t) * A + (o_l * A + o_a)
        b_turn = tl.load(p_turn, mask=(i_t + o_l < end) & (o_a < A), other=0)
        if turn.dtype.element_ty == tl.int16:
            b_turn = b_turn.to(tl.int32) << 16
    if HARDWARE:
        return cos_sin((b_turn + b_phase).to(tl.float32) * (RADIANS_PER_TURN * 2.0**-32), True)
    else:
        return cos_sin(from_fixed(b_turn + b_phase), False)


@triton.jit
def _piece(
    v, bias, i_h, i_g, i_t, end, first, n: tl.constexpr, G: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_BIAS: tl.constexpr, BULK: tl.constexpr,
    ONCE: tl.constexpr,
):  # fmt: skip
    """n channels of v [t, r, g, n] from `first` on plus bias [h, r, n], as [l, r, W] in float32.

    ONCE: not in a loop. The bias is then loaded for each token, from the cache; spread over tokens it takes barriers.
    """
    o_l, o_r, o_n = tl.arange(0, L)[:, None, None], tl.arange(0, RP)[None, :, None], tl.arange(0, W)[None, None, :]
    m_rn = (o_r < R) & (o_n < n)
    # The bias comes first because the compiler lets the last load choose how threads share the sum.
    if HAS_BIAS:
        p_bias = o_r * N + o_n
        if ONCE and RP > 1:
            p_bias = tl.broadcast_to(p_bias, (L, RP, W))
        b_bias = tl.load(bias + i_h * (R * N) + first + p_bias, mask=m_rn, other=0.0)
    if BULK:
        b_v = tl.reshape(v.load([i_t * R, i_g * N + first]), (L, RP, W))
    else:
        p_v = v + (i_t.to(tl.int64) * (R * G) + i_g) * N + first + ((o_l * R + o_r) * (G * N) + o_n)
        b_v = tl.load(p_v, mask=(i_t + o_l < end) & m_rn, other=0.0)
    b_v = b_v.to(tl.float32)
    if HAS_BIAS:
        b_v += b_bias
    return b_v


@triton.jit
def rotated_rows(
    v, bias, b_cos, b_sin, i_h, i_g, i_t, end, G: tl.constexpr, N: tl.constexpr, A: tl.constexpr, W: tl.constexpr,
    NQ: tl.constexpr, L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_BIAS: tl.constexpr, BULK: tl.constexpr,
    DTYPE: tl.constexpr, ONCE: tl.constexpr = False,
):  # fmt: skip
    """B or C of a chunk, with bias and rotated: rows (token, rank), rank fastest, of NQ columns in DTYPE.

    ONCE: as `_piece` has it."""
    U: tl.constexpr = N - 2 * A
    if A > 0:
        b_1 = _piece(v, bias, i_h, i_g, i_t, end, 0, A, G, N, W, L, R, RP, HAS_BIAS, BULK, ONCE)
        b_2 = _piece(v, bias, i_h, i_g, i_t, end, A, A, G, N, W, L, R, RP, HAS_BIAS, BULK, ONCE)
        b_pair = tl.join((b_1 * b_cos - b_2 * b_sin).to(DTYPE), (b_1 * b_sin + b_2 * b_cos).to(DTYPE))  # [l, r, w, 2]
    if U > 0:
        b_3 = _piece(v, bias, i_h, i_g, i_t, end, 2 * A, U, G, N, W, L, R, RP, HAS_BIAS, BULK, ONCE)
        b_4 = _piece(v, bias, i_h, i_g, i_t, end, 2 * A + W, U - W, G, N, W, L, R, RP, HAS_BIAS, BULK, ONCE)
        b_rest = tl.join(b_3.to(DTYPE), b_4.to(DTYPE))
    if A > 0 and U > 0:
        b_v = tl.permute(tl.join(b_pair, b_rest), (0, 1, 4, 3, 2))  # [l, r, pair or rest, which of two, w]
    elif A > 0:
        b_v = tl.permute(b_pair, (0, 1, 3, 2))
    else:
        b_v = tl.permute(b_rest, (0, 1, 3, 2))
    return tl.reshape(b_v, (L * RP, NQ))


@triton.jit
def turned_back(
    b_v, b_cos, b_sin, v, bias, i_h, i_g, i_t, end, G: tl.constexpr, N: tl.constexpr, A: tl.constexpr, W: tl.constexpr,
    L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The gradient b_v [l r, NQ] of `rotated_rows` of v, in float32, turned back by cos, sin [l, 1, W]; and what it says of
    the angles, dv_2 v_1 - dv_1 v_2 of each pair [l, r, W]."""
    U: tl.constexpr = N - 2 * A
    if U > 0:
        b_pair, b_rest = tl.split(tl.permute(tl.reshape(b_v, (L, RP, 2, 2, W)), (0, 1, 4, 3, 2)))  # [l, r, w, which]
    else:
        b_pair = tl.permute(tl.reshape(b_v, (L, RP, 2, W)), (0, 1, 3, 2))
    b_1, b_2 = tl.split(b_pair)
    b_back1, b_back2 = b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin
    b_back = tl.join(b_back1, b_back2)
    b_back = tl.permute(tl.join(b_back, b_rest), (0, 1, 4, 3, 2)) if U > 0 else tl.permute(b_back, (0, 1, 3, 2))
    b_own1 = _piece(v, bias, i_h, i_g, i_t, end, 0, A, G, N, W, L, R, RP, HAS_BIAS, False, True)
    b_own2 = _piece(v, bias, i_h, i_g, i_t, end, A, A, G, N, W, L, R, RP, HAS_BIAS, False, True)
    return tl.reshape(b_back, b_v.shape), b_back2 * b_own1 - b_back1 * b_own2


@triton.jit
def head_channels(x, i_h, i_t, end, row, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr, BULK: tl.constexpr):
    """x or z [t, h, p] of a chunk as [l, 1, p]. row: elements a token, because both are often columns of one projection."""
    if BULK:
        return tl.reshape(x.load([i_t, i_h * P]), (L, 1, PP))
    else:
        o_l, o_p = tl.arange(0, L)[:, None, None], tl.arange(0, PP)[None, None, :]
        p_x = x + (i_t.to(tl.int64) * row + i_h * P) + (o_l * row + o_p)
        return tl.load(p_x, mask=(i_t + o_l < end) & (o_p < P), other=0.0)


@triton.jit
def rank_weights(mimo, i_h, P: tl.constexpr, PP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """mimo [h, r, p] of a head as [1, r, p]; zero for ranks and channels there are not."""
    o_r, o_p = tl.arange(0, RP)[None, :, None], tl.arange(0, PP)[None, None, :]
    return tl.load(mimo + i_h * (R * P) + (o_r * P + o_p), mask=(o_r < R) & (o_p < P), other=0.0)


@triton.jit
def of_tokens(v, i_h, i_t, end, T, L: tl.constexpr, RP: tl.constexpr, BULK: tl.constexpr):
    """A coefficient [h, t] of each row [l r]; zero past the sequence's end."""
    o_l = tl.arange(0, L * RP) // RP
    p_v = v + (i_h.to(tl.int64) * T + i_t) + o_l
    if BULK:
        return tl.load(p_v)
    else:
        return tl.load(p_v, mask=i_t + o_l < end, other=0.0)
