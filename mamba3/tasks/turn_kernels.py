# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""B and C of every head, of sequences that lie one behind another: normed, biased, turned; and the decays' sums.

    v = raw / rms(raw) * weight + bias_h,    turned by phi_h,    sums_t = sum_{i <= t} log_alpha_i

One program a model and sequence, all heads, from the sequence's first token on; backwards from its last. Rows are what a
layer projects, [z | x | B | C] of `width` columns; a sequence is rows starts[b] ... starts[b + 1] - 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba3.tasks.mixing_kernels import RADIANS, TURN, TURNS


@triton.jit
def steps_of(theta, tick, rope, frequencies, row, m_t, o_h, o_a, H: tl.constexpr, A: tl.constexpr):
    """theta [l, a], tick [h, l], and what the angles advance by [h, l, a], of 2^32 a turn."""
    m_a, m_h = o_a < A, o_h < H
    b_theta = tl.load(theta + row[:, None] * A + o_a[None, :], mask=m_t[:, None] & m_a[None, :], other=0.0)
    b_tick = tl.load(tick + row[None, :] * H + o_h[:, None], mask=m_h[:, None] & m_t[None, :], other=0.0)
    b_rope = rope * tl.load(frequencies + o_a, mask=m_a, other=0.0)
    moved = tl.where(m_t[:, None], b_rope[None, :], 0.0)
    turns = (b_theta[None, :, :] * b_tick[:, :, None] + moved[None, :, :]) * TURNS
    return b_theta, b_tick, ((turns - tl.floor(turns)) * TURN).to(tl.int64).to(tl.int32)


@triton.jit
def unit_rows(v, row, m_t, o_a, o_u, EPS: tl.constexpr, W: tl.constexpr, N: tl.constexpr, A: tl.constexpr):
    """Rows of v as three tiles, of length one in the mean square, and what they were divided by, inverse [l]."""
    p, m_a, m_u = v + row[:, None] * W, o_a < A, o_u < N - 2 * A
    one, two = m_t[:, None] & m_a[None, :], m_t[:, None] & m_u[None, :]
    b_1 = tl.load(p + o_a[None, :], mask=one, other=0.0)
    b_2 = tl.load(p + A + o_a[None, :], mask=one, other=0.0)
    b_3 = tl.load(p + 2 * A + o_u[None, :], mask=two, other=0.0)
    square = tl.sum(b_1 * b_1, axis=1) + tl.sum(b_2 * b_2, axis=1) + tl.sum(b_3 * b_3, axis=1)
    inverse = tl.rsqrt(square / N + EPS)
    return b_1 * inverse[:, None], b_2 * inverse[:, None], b_3 * inverse[:, None], inverse


@triton.jit
def of_norm(weight, o_a, o_u, N: tl.constexpr, A: tl.constexpr):
    """A norm's weight [n] as three tiles."""
    m_a, m_u = o_a < A, o_u < N - 2 * A
    b_1, b_2 = tl.load(weight + o_a, mask=m_a, other=0.0), tl.load(weight + A + o_a, mask=m_a, other=0.0)
    return b_1, b_2, tl.load(weight + 2 * A + o_u, mask=m_u, other=0.0)


@triton.jit
def of_heads(bias, o_h, o_a, o_u, H: tl.constexpr, N: tl.constexpr, A: tl.constexpr):
    """bias [h, n] as three tiles."""
    p, m_h = bias + o_h[:, None] * N, (o_h < H)[:, None]
    m_a, m_u = m_h & (o_a < A)[None, :], m_h & (o_u < N - 2 * A)[None, :]
    b_1, b_2 = tl.load(p + o_a[None, :], mask=m_a, other=0.0), tl.load(p + A + o_a[None, :], mask=m_a, other=0.0)
    return b_1, b_2, tl.load(p + 2 * A + o_u[None, :], mask=m_u, other=0.0)


@triton.jit
def biased(u, weight, bias):
    """u [l, c] times weight [c] plus each head's bias [h, c]: [h, l, c]."""
    return (u * weight[None, :])[None, :, :] + bias[:, None, :]


@triton.jit
def store_heads(v, b_1, b_2, b_3, o_h, o_a, o_u, H: tl.constexpr, N: tl.constexpr, A: tl.constexpr):
    """Three tiles to v [h, n]."""
    p, m_h = v + o_h[:, None] * N, (o_h < H)[:, None]
    tl.store(p + o_a[None, :], b_1, mask=m_h & (o_a < A)[None, :])
    tl.store(p + A + o_a[None, :], b_2, mask=m_h & (o_a < A)[None, :])
    tl.store(p + 2 * A + o_u[None, :], b_3, mask=m_h & (o_u < N - 2 * A)[None, :])


@triton.jit
def store_norm(v, b_1, b_2, b_3, o_a, o_u, N: tl.constexpr, A: tl.constexpr):
    """Three tiles to v [n]."""
    tl.store(v + o_a, b_1, mask=o_a < A)
    tl.store(v + A + o_a, b_2, mask=o_a < A)
    tl.store(v + 2 * A + o_u, b_3, mask=o_u < N - 2 * A)


@triton.jit
def unnormed_rows(
    d, row, m_t, g_1, g_2, g_3, u_1, u_2, u_3, w_1, w_2, w_3, inverse, o_a, o_u, W: tl.constexpr, N: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """g, the gradient of normed rows, summed over heads, as that of the rows before, to d."""
    g_1, g_2, g_3 = g_1 * w_1[None, :], g_2 * w_2[None, :], g_3 * w_3[None, :]
    mean = (tl.sum(g_1 * u_1, axis=1) + tl.sum(g_2 * u_2, axis=1) + tl.sum(g_3 * u_3, axis=1)) / N
    p, m_a = d + row[:, None] * W, m_t[:, None] & (o_a < A)[None, :]
    m_u = m_t[:, None] & (o_u < N - 2 * A)[None, :]
    tl.store(p + o_a[None, :], inverse[:, None] * (g_1 - u_1 * mean[:, None]), mask=m_a)
    tl.store(p + A + o_a[None, :], inverse[:, None] * (g_2 - u_2 * mean[:, None]), mask=m_a)
    tl.store(p + 2 * A + o_u[None, :], inverse[:, None] * (g_3 - u_3 * mean[:, None]), mask=m_u)


@triton.jit
def _turned(
    v, weight, bias, out, row, p_out, m_t, cos, sin, o_h, o_a, o_u, EPS: tl.constexpr, W: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Rows of v to rows p_out [h, l] of out."""
    u_1, u_2, u_3, _ = unit_rows(v, row, m_t, o_a, o_u, EPS, W, N, A)
    w_1, w_2, w_3 = of_norm(weight, o_a, o_u, N, A)
    c_1, c_2, c_3 = of_heads(bias, o_h, o_a, o_u, H, N, A)
    v_1, v_2, v_3 = biased(u_1, w_1, c_1), biased(u_2, w_2, c_2), biased(u_3, w_3, c_3)
    p, mask = out + p_out[:, :, None], (o_h < H)[:, None, None] & m_t[None, :, None]
    m_a, m_u = mask & (o_a < A)[None, None, :], mask & (o_u < N - 2 * A)[None, None, :]
    tl.store(p + o_a[None, None, :], v_1 * cos - v_2 * sin, mask=m_a)
    tl.store(p + A + o_a[None, None, :], v_1 * sin + v_2 * cos, mask=m_a)
    tl.store(p + 2 * A + o_u[None, None, :], v_3, mask=m_u)


@triton.jit(do_not_specialize=["S", "count"])
def turn_kernel(
    B, C, theta, tick, log_alpha, rope, frequencies, B_norm, C_norm, B_bias, C_bias, starts, Bh, Ch, sums, phases, S,
    count, EPS: tl.constexpr, W: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, A: tl.constexpr,
    AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """B, C columns of [m, s, width] to Bh, Ch [m, h, s, n]; sums [m, s, h]; phases [m, count, h, a] of each sequence's end."""
    i_m, i_b = tl.program_id(1), count - 1 - tl.program_id(0)
    o_l, o_h, o_a, o_u = tl.arange(0, L), tl.arange(0, HP), tl.arange(0, AP), tl.arange(0, UP)
    start, rows = tl.load(starts + i_b), i_m.to(tl.int64) * S
    T = tl.load(starts + i_b + 1) - start
    b_rope, phase, total = tl.load(rope + i_m), tl.zeros((HP, AP), tl.int32), tl.zeros((HP,), tl.float32)
    for k in range(tl.cdiv(T, L)):
        t = k * L + o_l
        m_t, at = t < T, start + t
        row = rows + at
        _, _, step = steps_of(theta, tick, b_rope, frequencies, row, m_t, o_h, o_a, H, A)
        phi = (tl.cumsum(step, axis=1).to(tl.int32) + phase[:, None, :]).to(tl.float32) * RADIANS
        phase = (phase + tl.sum(step, axis=1)).to(tl.int32)
        cos, sin = tl.cos(phi), tl.sin(phi)
        p_out = ((i_m.to(tl.int64) * H + o_h)[:, None] * S + at[None, :]) * N
        _turned(
            B, B_norm + i_m * N, B_bias + i_m * H * N, Bh, row, p_out, m_t, cos, sin, o_h, o_a, o_u, EPS, W, H, N, A
        )
        _turned(
            C, C_norm + i_m * N, C_bias + i_m * H * N, Ch, row, p_out, m_t, cos, sin, o_h, o_a, o_u, EPS, W, H, N, A
        )
        p_h, m_h = row[None, :] * H + o_h[:, None], (o_h < H)[:, None] & m_t[None, :]
        b_log = tl.load(log_alpha + p_h, mask=m_h, other=0.0)
        tl.store(sums + p_h, tl.cumsum(b_log, axis=1) + total[:, None], mask=m_h)
        total += tl.sum(b_log, axis=1)
    p_end = phases + ((i_m * count + i_b) * H + o_h)[:, None] * A + o_a[None, :]
    tl.store(p_end, phase, mask=(o_h < H)[:, None] & (o_a < A)[None, :])


@triton.jit
def _turned_back(
    v, weight, bias, d, dv, row, p_d, m_t, cos, sin, o_h, o_a, o_u, EPS: tl.constexpr, W: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """d, the gradient of turned rows, to that of rows of v, dv; the bias's three tiles [h, c], the norm's [c], the angles'
    [h, l, a]."""
    u_1, u_2, u_3, inverse = unit_rows(v, row, m_t, o_a, o_u, EPS, W, N, A)
    w_1, w_2, w_3 = of_norm(weight, o_a, o_u, N, A)
    c_1, c_2, _ = of_heads(bias, o_h, o_a, o_u, H, N, A)
    p, mask = d + p_d[:, :, None], (o_h < H)[:, None, None] & m_t[None, :, None]
    m_a, m_u = mask & (o_a < A)[None, None, :], mask & (o_u < N - 2 * A)[None, None, :]
    d_1 = tl.load(p + o_a[None, None, :], mask=m_a, other=0.0)
    d_2 = tl.load(p + A + o_a[None, None, :], mask=m_a, other=0.0)
    e_3 = tl.load(p + 2 * A + o_u[None, None, :], mask=m_u, other=0.0)
    e_1, e_2 = d_1 * cos + d_2 * sin, d_2 * cos - d_1 * sin
    dphi = e_2 * biased(u_1, w_1, c_1) - e_1 * biased(u_2, w_2, c_2)
    g_1, g_2, g_3 = tl.sum(e_1, axis=0), tl.sum(e_2, axis=0), tl.sum(e_3, axis=0)
    unnormed_rows(dv, row, m_t, g_1, g_2, g_3, u_1, u_2, u_3, w_1, w_2, w_3, inverse, o_a, o_u, W, N, A)
    n_1, n_2, n_3 = tl.sum(g_1 * u_1, axis=0), tl.sum(g_2 * u_2, axis=0), tl.sum(g_3 * u_3, axis=0)
    return tl.sum(e_1, axis=1), tl.sum(e_2, axis=1), tl.sum(e_3, axis=1), n_1, n_2, n_3, dphi


@triton.jit(do_not_specialize=["S", "count"])
def turn_back_kernel(
    B, C, theta, tick, w, rope, frequencies, B_norm, C_norm, B_bias, C_bias, starts, phases, dBh, dCh, drow, dw, dB, dC,
    dtheta, dtick, dlog_alpha, parts, S, count, EPS: tl.constexpr, W: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """dBh, dCh [m, h, s, n], drow of sums' rows and dw [m, s, h] to columns dB, dC of [m, s, width], dtheta [m, s, a], dtick,
    dlog_alpha [m, s, h]; parts [m, count, (B_bias [h, n], C_bias [h, n], B_norm [n], C_norm [n])]."""
    i_m, i_b = tl.program_id(1), count - 1 - tl.program_id(0)
    o_l, o_h, o_a, o_u = tl.arange(0, L), tl.arange(0, HP), tl.arange(0, AP), tl.arange(0, UP)
    start, rows = tl.load(starts + i_b), i_m.to(tl.int64) * S
    T = tl.load(starts + i_b + 1) - start
    b_rope, turned, later = tl.load(rope + i_m), tl.zeros((HP, AP), tl.float32), tl.zeros((HP,), tl.float32)
    p_end = phases + ((i_m * count + i_b) * H + o_h)[:, None] * A + o_a[None, :]
    phase = tl.load(p_end, mask=(o_h < H)[:, None] & (o_a < A)[None, :], other=0)
    bB_1, bB_2, bB_3 = tl.zeros((HP, AP), tl.float32), tl.zeros((HP, AP), tl.float32), tl.zeros((HP, UP), tl.float32)
    bC_1, bC_2, bC_3 = tl.zeros((HP, AP), tl.float32), tl.zeros((HP, AP), tl.float32), tl.zeros((HP, UP), tl.float32)
    nB_1, nB_2, nB_3 = tl.zeros((AP,), tl.float32), tl.zeros((AP,), tl.float32), tl.zeros((UP,), tl.float32)
    nC_1, nC_2, nC_3 = tl.zeros((AP,), tl.float32), tl.zeros((AP,), tl.float32), tl.zeros((UP,), tl.float32)
    chunks = tl.cdiv(T, L)
    for i in range(chunks):
        t = (chunks - 1 - i) * L + o_l
        m_t, at = t < T, start + t
        row = rows + at
        b_theta, b_tick, step = steps_of(theta, tick, b_rope, frequencies, row, m_t, o_h, o_a, H, A)
        phase = (phase - tl.sum(step, axis=1)).to(tl.int32)
        phi = (tl.cumsum(step, axis=1).to(tl.int32) + phase[:, None, :]).to(tl.float32) * RADIANS
        cos, sin = tl.cos(phi), tl.sin(phi)
        p_d = ((i_m.to(tl.int64) * H + o_h)[:, None] * S + at[None, :]) * N
        h_1, h_2, h_3, n_1, n_2, n_3, dphi = _turned_back(
            B, B_norm + i_m * N, B_bias + i_m * H * N, dBh, dB, row, p_d, m_t, cos, sin, o_h, o_a, o_u, EPS, W, H, N, A
        )
        bB_1, bB_2, bB_3, nB_1, nB_2, nB_3 = bB_1 + h_1, bB_2 + h_2, bB_3 + h_3, nB_1 + n_1, nB_2 + n_2, nB_3 + n_3
        h_1, h_2, h_3, n_1, n_2, n_3, more = _turned_back(
            C, C_norm + i_m * N, C_bias + i_m * H * N, dCh, dC, row, p_d, m_t, cos, sin, o_h, o_a, o_u, EPS, W, H, N, A
        )
        bC_1, bC_2, bC_3, nC_1, nC_2, nC_3 = bC_1 + h_1, bC_2 + h_2, bC_3 + h_3, nC_1 + n_1, nC_2 + n_2, nC_3 + n_3
        dphi += more
        whole = tl.sum(dphi, axis=1)
        dstep = (turned + whole)[:, None, :] - tl.cumsum(dphi, axis=1) + dphi
        turned += whole
        d_theta = tl.sum(dstep * b_tick[:, :, None], axis=0)
        tl.store(dtheta + row[:, None] * A + o_a[None, :], d_theta, mask=m_t[:, None] & (o_a < A)[None, :])
        p_h, m_h = row[None, :] * H + o_h[:, None], (o_h < H)[:, None] & m_t[None, :]
        tl.store(dtick + p_h, tl.sum(dstep * b_theta[None, :, :], axis=2), mask=m_h)
        dsums = tl.load(drow + p_h, mask=m_h, other=0.0)
        dsums -= tl.load(w + p_h, mask=m_h, other=0.0) * tl.load(dw + p_h, mask=m_h, other=0.0)
        last = tl.sum(dsums, axis=1)
        tl.store(dlog_alpha + p_h, (later + last)[:, None] - tl.cumsum(dsums, axis=1) + dsums, mask=m_h)
        later += last
    p = parts + (i_m * count + i_b).to(tl.int64) * (2 * H * N + 2 * N)
    store_heads(p, bB_1, bB_2, bB_3, o_h, o_a, o_u, H, N, A)
    store_heads(p + H * N, bC_1, bC_2, bC_3, o_h, o_a, o_u, H, N, A)
    store_norm(p + 2 * H * N, nB_1, nB_2, nB_3, o_a, o_u, N, A)
    store_norm(p + 2 * H * N + N, nC_1, nC_2, nC_3, o_a, o_u, N, A)
