# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The matrices of a layer whose sequences are short: all pairs of a sequence's tokens, tile by tile, and no state.

    y_t = C_t . (sum_{s < t} exp(sums_t - sums_s) w_s B_s x_s + gamma_t B_t x_t) + D x_t,    gated by silu(z_t)

B and C as `turn_kernels` leave them. weigh: a tile of tokens t, over those before it. weigh_back_rows: the same programs, what
t's own terms are the gradients of. weigh_back_columns: a tile of tokens s, over those behind it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _decay(t, s, sums_t, sums_s):
    """exp(sums_t - sums_s) where s < t, else 0; t and s as they broadcast."""
    return tl.exp(tl.where(t > s, sums_t - sums_s, -float("inf")))


@triton.jit
def _place(starts, S, count, H: tl.constexpr):
    """Of a program: model, head, sequence, its first row and its length; long sequences first."""
    i_s = tl.program_id(2)
    i_m, i_b = i_s // count, count - 1 - i_s % count
    start = tl.load(starts + i_b)
    return i_m, tl.program_id(1), i_b, i_m.to(tl.int64) * S + start, tl.load(starts + i_b + 1) - start


@triton.jit(do_not_specialize=["S", "count"])
def weigh_kernel(
    x, z, Bh, Ch, sums, w, gamma, D, starts, inner, y, S, count, W: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x, z: columns of [m, s, width]; inner and, gated, y [m, s, h p]."""
    i_m, i_h, _, first, T = _place(starts, S, count, H)
    o_n, o_p = tl.arange(0, NP), tl.arange(0, PP)
    t = tl.program_id(0) * L + tl.arange(0, L)
    if tl.program_id(0) * L < T:
        m_t, row = t < T, first + t
        turned = (i_m.to(tl.int64) * H * S + i_h * S.to(tl.int64)) + (first - i_m.to(tl.int64) * S)
        m_n, m_p = (o_n < N)[None, :], (o_p < P)[None, :]
        b_C = tl.load(Ch + (turned + t)[:, None] * N + o_n[None, :], mask=m_t[:, None] & m_n, other=0.0)
        sums_t = tl.load(sums + row * H + i_h, mask=m_t, other=-float("inf"))
        gamma_t = tl.load(gamma + row * H + i_h, mask=m_t, other=0.0)
        b_y = tl.zeros((L, PP), tl.float32)
        for j in range(tl.program_id(0) + 1):
            s = j * L + tl.arange(0, L)
            m_s, row_s = s < T, first + s
            b_B = tl.load(Bh + (turned + s)[:, None] * N + o_n[None, :], mask=m_s[:, None] & m_n, other=0.0)
            b_x = tl.load(x + row_s[:, None] * W + i_h * P + o_p[None, :], mask=m_s[:, None] & m_p, other=0.0)
            sums_s = tl.load(sums + row_s * H + i_h, mask=m_s, other=0.0)
            w_s = tl.load(w + row_s * H + i_h, mask=m_s, other=0.0)
            weights = _decay(t[:, None], s[None, :], sums_t[:, None], sums_s[None, :]) * w_s[None, :]
            weights += tl.where(t[:, None] == s[None, :], gamma_t[:, None], 0.0)
            b_y += _product(_product(b_C, tl.trans(b_B), PRECISION) * weights, b_x, PRECISION)
        mask, p_x = m_t[:, None] & m_p, row[:, None] * W + i_h * P + o_p[None, :]
        b_y += tl.load(D + i_m * H + i_h) * tl.load(x + p_x, mask=mask, other=0.0)
        b_z = tl.load(z + p_x, mask=mask, other=0.0)
        p_y = row[:, None] * (H * P) + i_h * P + o_p[None, :]
        tl.store(inner + p_y, b_y, mask=mask)
        tl.store(y + p_y, b_y * b_z * tl.sigmoid(b_z), mask=mask)


@triton.jit(do_not_specialize=["S", "count"])
def weigh_back_rows_kernel(
    x, z, Bh, Ch, sums, w, gamma, inner, dy, starts, dz, dCh, drow, dgamma, dD, S, count, W: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dz columns of [m, s, width]; dCh [m, h, s, n]; drow, dgamma [m, s, h]; dD [m, count, h, tiles]."""
    i_m, i_h, i_b, first, T = _place(starts, S, count, H)
    o_n, o_p = tl.arange(0, NP), tl.arange(0, PP)
    t = tl.program_id(0) * L + tl.arange(0, L)
    own = 0.0
    if tl.program_id(0) * L < T:
        m_t, row = t < T, first + t
        turned = (i_m.to(tl.int64) * H * S + i_h * S.to(tl.int64)) + (first - i_m.to(tl.int64) * S)
        m_n, m_p = (o_n < N)[None, :], (o_p < P)[None, :]
        mask, p_x = m_t[:, None] & m_p, row[:, None] * W + i_h * P + o_p[None, :]
        p_y = row[:, None] * (H * P) + i_h * P + o_p[None, :]
        b_dy, b_z = tl.load(dy + p_y, mask=mask, other=0.0), tl.load(z + p_x, mask=mask, other=0.0)
        gate = tl.sigmoid(b_z)
        slope = gate * (1.0 + b_z * (1.0 - gate))
        tl.store(dz + p_x, b_dy * tl.load(inner + p_y, mask=mask, other=0.0) * slope, mask=mask)
        b_dy = b_dy * b_z * gate
        own = tl.sum(tl.sum(b_dy * tl.load(x + p_x, mask=mask, other=0.0), axis=1), axis=0)
        b_C = tl.load(Ch + (turned + t)[:, None] * N + o_n[None, :], mask=m_t[:, None] & m_n, other=0.0)
        sums_t = tl.load(sums + row * H + i_h, mask=m_t, other=-float("inf"))
        gamma_t = tl.load(gamma + row * H + i_h, mask=m_t, other=0.0)
        b_dC, b_row, b_diagonal = tl.zeros((L, NP), tl.float32), tl.zeros((L,), tl.float32), tl.zeros((L,), tl.float32)
        for j in range(tl.program_id(0) + 1):
            s = j * L + tl.arange(0, L)
            m_s, row_s = s < T, first + s
            b_B = tl.load(Bh + (turned + s)[:, None] * N + o_n[None, :], mask=m_s[:, None] & m_n, other=0.0)
            b_x = tl.load(x + row_s[:, None] * W + i_h * P + o_p[None, :], mask=m_s[:, None] & m_p, other=0.0)
            sums_s = tl.load(sums + row_s * H + i_h, mask=m_s, other=0.0)
            w_s = tl.load(w + row_s * H + i_h, mask=m_s, other=0.0)
            weights = _decay(t[:, None], s[None, :], sums_t[:, None], sums_s[None, :]) * w_s[None, :]
            same = t[:, None] == s[None, :]
            dM = _product(b_dy, tl.trans(b_x), PRECISION)
            within = dM * _product(b_C, tl.trans(b_B), PRECISION)
            b_diagonal += tl.sum(tl.where(same, within, 0.0), axis=1)
            b_row += tl.sum(within * weights, axis=1)
            weights += tl.where(same, gamma_t[:, None], 0.0)
            b_dC += _product(dM * weights, b_B, PRECISION)
        tl.store(dCh + (turned + t)[:, None] * N + o_n[None, :], b_dC, mask=m_t[:, None] & m_n)
        tl.store(drow + row * H + i_h, b_row, mask=m_t)
        tl.store(dgamma + row * H + i_h, b_diagonal, mask=m_t)
    tl.store(dD + ((i_m * count + i_b) * H + i_h) * tl.num_programs(0) + tl.program_id(0), own)


@triton.jit(do_not_specialize=["S", "count"])
def weigh_back_columns_kernel(
    x, z, Bh, Ch, sums, w, gamma, D, dy, starts, dx, dBh, dw, S, count, W: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx columns of [m, s, width]; dBh [m, h, s, n]; dw [m, s, h]. Matrices are [s, t]."""
    i_m, i_h, _, first, T = _place(starts, S, count, H)
    o_n, o_p = tl.arange(0, NP), tl.arange(0, PP)
    s = tl.program_id(0) * L + tl.arange(0, L)
    if tl.program_id(0) * L < T:
        m_s, row_s = s < T, first + s
        turned = (i_m.to(tl.int64) * H * S + i_h * S.to(tl.int64)) + (first - i_m.to(tl.int64) * S)
        m_n, m_p = (o_n < N)[None, :], (o_p < P)[None, :]
        mask, p_x = m_s[:, None] & m_p, row_s[:, None] * W + i_h * P + o_p[None, :]
        b_B = tl.load(Bh + (turned + s)[:, None] * N + o_n[None, :], mask=m_s[:, None] & m_n, other=0.0)
        b_x = tl.load(x + p_x, mask=mask, other=0.0)
        sums_s = tl.load(sums + row_s * H + i_h, mask=m_s, other=0.0)
        w_s = tl.load(w + row_s * H + i_h, mask=m_s, other=0.0)
        b_dB, b_dx, b_dw = tl.zeros((L, NP), tl.float32), tl.zeros((L, PP), tl.float32), tl.zeros((L,), tl.float32)
        for i in range(tl.program_id(0), tl.cdiv(T, L)):
            t = i * L + tl.arange(0, L)
            m_t, row = t < T, first + t
            p_z = row[:, None] * W + i_h * P + o_p[None, :]
            p_y = row[:, None] * (H * P) + i_h * P + o_p[None, :]
            b_dy = tl.load(dy + p_y, mask=m_t[:, None] & m_p, other=0.0)
            b_z = tl.load(z + p_z, mask=m_t[:, None] & m_p, other=0.0)
            b_dy = b_dy * b_z * tl.sigmoid(b_z)
            b_C = tl.load(Ch + (turned + t)[:, None] * N + o_n[None, :], mask=m_t[:, None] & m_n, other=0.0)
            sums_t = tl.load(sums + row * H + i_h, mask=m_t, other=-float("inf"))
            gamma_t = tl.load(gamma + row * H + i_h, mask=m_t, other=0.0)
            decay = _decay(t[None, :], s[:, None], sums_t[None, :], sums_s[:, None])
            weights = decay * w_s[:, None] + tl.where(t[None, :] == s[:, None], gamma_t[None, :], 0.0)
            scores = _product(b_B, tl.trans(b_C), PRECISION)
            dM = _product(b_x, tl.trans(b_dy), PRECISION)
            b_dw += tl.sum(dM * scores * decay, axis=1)
            b_dx += _product(scores * weights, b_dy, PRECISION)
            b_dB += _product(dM * weights, b_C, PRECISION)
            if i == tl.program_id(0):
                b_dx += tl.load(D + i_m * H + i_h) * b_dy
        tl.store(dx + p_x, b_dx, mask=mask)
        tl.store(dBh + (turned + s)[:, None] * N + o_n[None, :], b_dB, mask=m_s[:, None] & m_n)
        tl.store(dw + row_s * H + i_h, b_dw, mask=m_s)
