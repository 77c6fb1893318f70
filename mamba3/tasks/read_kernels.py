# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""What a layer answers at the last token of each sequence alone, of sequences that lie one behind another.

    y = C . (sum_{s < T} exp(sum_{i > s} log_alpha_i) w_s B_s x_s + gamma_T B_T x_T) + D x_T,    gated by silu(z)

The angle between s and T is what counts, so B is turned back by what the angles advance behind it, and C is not turned. No
matrices: one query a sequence and head. One program a model and sequence, all heads; forwards from the last token, backwards
from the first. Rows are [x | B] of `width` columns, asked rows [z | ... | C] of `asked_width`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.tasks.mixing_kernels import RADIANS
from mamba3.tasks.turn_kernels import (
    biased,
    of_heads,
    of_norm,
    steps_of,
    store_heads,
    store_norm,
    unit_rows,
    unnormed_rows,
)


@triton.jit
def _query(
    C, C_norm, C_bias, of_asked, o_h, o_a, o_u, EPS: tl.constexpr, V: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """C of the asked token, normed and biased: three tiles [h, c]."""
    one = of_asked + tl.zeros((1,), tl.int64)
    u_1, u_2, u_3, _ = unit_rows(C, one, one >= 0, o_a, o_u, EPS, V, N, A)
    w_1, w_2, w_3 = of_norm(C_norm, o_a, o_u, N, A)
    c_1, c_2, c_3 = of_heads(C_bias, o_h, o_a, o_u, H, N, A)
    m_h = (o_h < H)[:, None]
    return (
        tl.where(m_h, tl.sum(biased(u_1, w_1, c_1), axis=1), 0.0),
        tl.where(m_h, tl.sum(biased(u_2, w_2, c_2), axis=1), 0.0),
        tl.where(m_h, tl.sum(biased(u_3, w_3, c_3), axis=1), 0.0),
    )


@triton.jit(do_not_specialize=["S", "count"])
def read_kernel(
    x, B, z, C, theta, tick, log_alpha, w, gamma, rope, frequencies, B_norm, C_norm, B_bias, C_bias, D, starts, inner, y,
    phases, totals, S, count, EPS: tl.constexpr, W: tl.constexpr, V: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    P: tl.constexpr, PP: tl.constexpr, N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """x, B: columns of [m, s, width]; z, C of [m, count, asked_width]; inner and, gated, y [m, count, h p]; phases
    [m, count, h, a] and totals [m, count, h], all that the angles and decays advance by."""
    i_m, i_b = tl.program_id(1), count - 1 - tl.program_id(0)
    o_l, o_h, o_a, o_u, o_p = tl.arange(0, L), tl.arange(0, HP), tl.arange(0, AP), tl.arange(0, UP), tl.arange(0, PP)
    start, rows, of_asked = tl.load(starts + i_b), i_m.to(tl.int64) * S, i_m.to(tl.int64) * count + i_b
    T = tl.load(starts + i_b + 1) - start
    q_1, q_2, q_3 = _query(C, C_norm + i_m * N, C_bias + i_m * H * N, of_asked, o_h, o_a, o_u, EPS, V, H, N, A)
    w_1, w_2, w_3 = of_norm(B_norm + i_m * N, o_a, o_u, N, A)
    c_1, c_2, c_3 = of_heads(B_bias + i_m * H * N, o_h, o_a, o_u, H, N, A)
    b_rope, phase, total = tl.load(rope + i_m), tl.zeros((HP, AP), tl.int32), tl.zeros((HP,), tl.float32)
    b_D, b_y = tl.load(D + i_m * H + o_h, mask=o_h < H, other=0.0), tl.zeros((HP, PP), tl.float32)
    chunks = tl.cdiv(T, L)
    for i in range(chunks):
        t = (chunks - 1 - i) * L + o_l
        m_t, row = t < T, rows + start + t
        _, _, step = steps_of(theta, tick, b_rope, frequencies, row, m_t, o_h, o_a, H, A)
        whole = tl.sum(step, axis=1)
        later = (phase + whole)[:, None, :] - tl.cumsum(step, axis=1)
        phi = later.to(tl.int32).to(tl.float32) * RADIANS
        phase = (phase + whole).to(tl.int32)
        cos, sin = tl.cos(phi), tl.sin(phi)
        u_1, u_2, u_3, _ = unit_rows(B, row, m_t, o_a, o_u, EPS, W, N, A)
        v_1, v_2, v_3 = biased(u_1, w_1, c_1), biased(u_2, w_2, c_2), biased(u_3, w_3, c_3)
        turned_1, turned_2 = v_1 * cos + v_2 * sin, v_2 * cos - v_1 * sin
        scores = tl.sum(turned_1 * q_1[:, None, :] + turned_2 * q_2[:, None, :], axis=2)
        scores += tl.sum(v_3 * q_3[:, None, :], axis=2)
        p_h, m_h = row[None, :] * H + o_h[:, None], (o_h < H)[:, None] & m_t[None, :]
        b_log = tl.load(log_alpha + p_h, mask=m_h, other=0.0)
        added = tl.sum(b_log, axis=1)
        decay = tl.exp((total + added)[:, None] - tl.cumsum(b_log, axis=1))
        total += added
        weights = decay * tl.load(w + p_h, mask=m_h, other=0.0)
        same = (t == T - 1)[None, :]
        weights = scores * tl.where(same, tl.load(gamma + p_h, mask=m_h, other=0.0), weights)
        weights += tl.where(same, b_D[:, None], 0.0)
        m_x = m_h[:, :, None] & (o_p < P)[None, None, :]
        p_x = (row * W)[None, :, None] + (o_h * P)[:, None, None] + o_p[None, None, :]
        b_y += tl.sum(weights[:, :, None] * tl.load(x + p_x, mask=m_x, other=0.0), axis=1)
    m_p = (o_h < H)[:, None] & (o_p < P)[None, :]
    own = o_h[:, None] * P + o_p[None, :]
    b_z = tl.load(z + of_asked * V + own, mask=m_p, other=0.0)
    tl.store(inner + of_asked * (H * P) + own, b_y, mask=m_p)
    tl.store(y + of_asked * (H * P) + own, b_y * b_z * tl.sigmoid(b_z), mask=m_p)
    p_end = phases + (of_asked * H + o_h)[:, None] * A + o_a[None, :]
    tl.store(p_end, phase, mask=(o_h < H)[:, None] & (o_a < A)[None, :])
    tl.store(totals + of_asked * H + o_h, total, mask=o_h < H)


@triton.jit(do_not_specialize=["S", "count"])
def read_back_kernel(
    x, B, z, C, theta, tick, log_alpha, w, gamma, rope, frequencies, B_norm, C_norm, B_bias, C_bias, D, starts, inner,
    phases, totals, dy, dx, dB, dz, dC, dtheta, dtick, dlog_alpha, dw, dgamma, parts, S, count, EPS: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Gradients laid out as what they are of; parts [m, count, B_bias and C_bias [h, n], B_norm and C_norm [n], D [h]]."""
    i_m, i_b = tl.program_id(1), count - 1 - tl.program_id(0)
    o_l, o_h, o_a, o_u, o_p = tl.arange(0, L), tl.arange(0, HP), tl.arange(0, AP), tl.arange(0, UP), tl.arange(0, PP)
    start, rows, of_asked = tl.load(starts + i_b), i_m.to(tl.int64) * S, i_m.to(tl.int64) * count + i_b
    T = tl.load(starts + i_b + 1) - start
    q_1, q_2, q_3 = _query(C, C_norm + i_m * N, C_bias + i_m * H * N, of_asked, o_h, o_a, o_u, EPS, V, H, N, A)
    w_1, w_2, w_3 = of_norm(B_norm + i_m * N, o_a, o_u, N, A)
    c_1, c_2, c_3 = of_heads(B_bias + i_m * H * N, o_h, o_a, o_u, H, N, A)
    m_p, own = (o_h < H)[:, None] & (o_p < P)[None, :], o_h[:, None] * P + o_p[None, :]
    b_z, b_dy = (
        tl.load(z + of_asked * V + own, mask=m_p, other=0.0),
        tl.load(dy + of_asked * (H * P) + own, mask=m_p, other=0.0),
    )
    gate, b_y = tl.sigmoid(b_z), tl.load(inner + of_asked * (H * P) + own, mask=m_p, other=0.0)
    tl.store(dz + of_asked * V + own, b_dy * b_y * gate * (1.0 + b_z * (1.0 - gate)), mask=m_p)
    b_dy = b_dy * b_z * gate
    b_D, b_dD = tl.load(D + i_m * H + o_h, mask=o_h < H, other=0.0), tl.zeros((HP,), tl.float32)
    p_end = phases + (of_asked * H + o_h)[:, None] * A + o_a[None, :]
    left = tl.load(p_end, mask=(o_h < H)[:, None] & (o_a < A)[None, :], other=0)
    total = tl.load(totals + of_asked * H + o_h, mask=o_h < H, other=0.0)
    b_rope, turned, before = tl.load(rope + i_m), tl.zeros((HP, AP), tl.float32), tl.zeros((HP,), tl.float32)
    d_1, d_2, d_3 = tl.zeros((HP, AP), tl.float32), tl.zeros((HP, AP), tl.float32), tl.zeros((HP, UP), tl.float32)
    h_1, h_2, h_3 = tl.zeros((HP, AP), tl.float32), tl.zeros((HP, AP), tl.float32), tl.zeros((HP, UP), tl.float32)
    n_1, n_2, n_3 = tl.zeros((AP,), tl.float32), tl.zeros((AP,), tl.float32), tl.zeros((UP,), tl.float32)
    for k in range(tl.cdiv(T, L)):
        t = k * L + o_l
        m_t, row = t < T, rows + start + t
        b_theta, b_tick, step = steps_of(theta, tick, b_rope, frequencies, row, m_t, o_h, o_a, H, A)
        later = left[:, None, :] - tl.cumsum(step, axis=1)
        phi = later.to(tl.int32).to(tl.float32) * RADIANS
        left = (left - tl.sum(step, axis=1)).to(tl.int32)
        cos, sin = tl.cos(phi), tl.sin(phi)
        u_1, u_2, u_3, inverse = unit_rows(B, row, m_t, o_a, o_u, EPS, W, N, A)
        v_1, v_2, v_3 = biased(u_1, w_1, c_1), biased(u_2, w_2, c_2), biased(u_3, w_3, c_3)
        turned_1, turned_2 = v_1 * cos + v_2 * sin, v_2 * cos - v_1 * sin
        scores = tl.sum(turned_1 * q_1[:, None, :] + turned_2 * q_2[:, None, :], axis=2)
        scores += tl.sum(v_3 * q_3[:, None, :], axis=2)
        p_h, m_h = row[None, :] * H + o_h[:, None], (o_h < H)[:, None] & m_t[None, :]
        b_log = tl.load(log_alpha + p_h, mask=m_h, other=0.0)
        decay = tl.exp(total[:, None] - tl.cumsum(b_log, axis=1))
        total -= tl.sum(b_log, axis=1)
        same = m_h & (t == T - 1)[None, :]
        weights = tl.where(same, 0.0, decay * tl.load(w + p_h, mask=m_h, other=0.0))
        both = tl.where(same, tl.load(gamma + p_h, mask=m_h, other=0.0), weights)
        m_x = m_h[:, :, None] & (o_p < P)[None, None, :]
        p_x = (row * W)[None, :, None] + (o_h * P)[:, None, None] + o_p[None, None, :]
        b_x = tl.load(x + p_x, mask=m_x, other=0.0)
        seen = tl.sum(b_x * b_dy[:, None, :], axis=2)
        b_dD += tl.sum(tl.where(same, seen, 0.0), axis=1)
        into_x = scores * both + tl.where(same, b_D[:, None], 0.0)
        tl.store(dx + p_x, into_x[:, :, None] * b_dy[:, None, :], mask=m_x)
        tl.store(dw + p_h, tl.where(same, 0.0, scores * decay * seen), mask=m_h)
        tl.store(dgamma + p_h, tl.where(same, scores * seen, 0.0), mask=m_h)
        r = scores * weights * seen
        whole = tl.sum(r, axis=1)
        tl.store(dlog_alpha + p_h, before[:, None] + tl.cumsum(r, axis=1) - r, mask=m_h)
        before += whole
        dscores = (both * seen)[:, :, None]
        d_1 += tl.sum(dscores * turned_1, axis=1)
        d_2 += tl.sum(dscores * turned_2, axis=1)
        d_3 += tl.sum(dscores * v_3, axis=1)
        e_1 = dscores * (q_1[:, None, :] * cos - q_2[:, None, :] * sin)
        e_2 = dscores * (q_1[:, None, :] * sin + q_2[:, None, :] * cos)
        e_3 = dscores * q_3[:, None, :]
        dlater = e_1 * v_2 - e_2 * v_1
        moved = tl.sum(dlater, axis=1)
        dstep = turned[:, None, :] + tl.cumsum(dlater, axis=1) - dlater
        turned += moved
        d_theta = tl.sum(dstep * b_tick[:, :, None], axis=0)
        tl.store(dtheta + row[:, None] * A + o_a[None, :], d_theta, mask=m_t[:, None] & (o_a < A)[None, :])
        tl.store(dtick + p_h, tl.sum(dstep * b_theta[None, :, :], axis=2), mask=m_h)
        h_1, h_2, h_3 = h_1 + tl.sum(e_1, axis=1), h_2 + tl.sum(e_2, axis=1), h_3 + tl.sum(e_3, axis=1)
        g_1, g_2, g_3 = tl.sum(e_1, axis=0), tl.sum(e_2, axis=0), tl.sum(e_3, axis=0)
        n_1, n_2, n_3 = (
            n_1 + tl.sum(g_1 * u_1, axis=0),
            n_2 + tl.sum(g_2 * u_2, axis=0),
            n_3 + tl.sum(g_3 * u_3, axis=0),
        )
        unnormed_rows(dB, row, m_t, g_1, g_2, g_3, u_1, u_2, u_3, w_1, w_2, w_3, inverse, o_a, o_u, W, N, A)
    p = parts + of_asked * (2 * H * N + 2 * N + H)
    store_heads(p, h_1, h_2, h_3, o_h, o_a, o_u, H, N, A)
    store_heads(p + H * N, d_1, d_2, d_3, o_h, o_a, o_u, H, N, A)
    store_norm(p + 2 * H * N, n_1, n_2, n_3, o_a, o_u, N, A)
    one = of_asked + tl.zeros((1,), tl.int64)
    u_1, u_2, u_3, inverse = unit_rows(C, one, one >= 0, o_a, o_u, EPS, V, N, A)
    w_1, w_2, w_3 = of_norm(C_norm + i_m * N, o_a, o_u, N, A)
    g_1, g_2, g_3 = tl.sum(d_1, axis=0)[None, :], tl.sum(d_2, axis=0)[None, :], tl.sum(d_3, axis=0)[None, :]
    p_norm = p + 2 * H * N + N
    store_norm(p_norm, tl.sum(g_1 * u_1, axis=0), tl.sum(g_2 * u_2, axis=0), tl.sum(g_3 * u_3, axis=0), o_a, o_u, N, A)
    unnormed_rows(dC, one, one >= 0, g_1, g_2, g_3, u_1, u_2, u_3, w_1, w_2, w_3, inverse, o_a, o_u, V, N, A)
    tl.store(p_norm + N + o_h, b_dD, mask=o_h < H)
