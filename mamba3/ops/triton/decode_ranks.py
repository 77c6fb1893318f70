# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""The decode kernel of several ranks: each rank costs three products with the state, so that vectors must come cheaply.

The state is two tiles [p, HALF / W, W]: W channels along a few threads keep the sums of the read-out short, and a vector of
channels has fewer elements than the program threads, so that each thread loads its own from the cache. B and C of the token
therefore pass through memory (B_prev, C_now) instead of through a barrier and a change of layout for each rank and use.
Against the kernel of one rank with a loop over ranks: 0.228 against 0.286 ms at batch 128, 0.147 against 0.222 in 16 bits.
With one rank the detour costs more than it saves (0.233 against 0.192).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from mamba3.ops.triton.decode_token import EPS, activations, moved_angle, narrow, padding, sigmoid


@triton.jit
def _vectors(
    v, weight, bias, i_h, i_g, b_cos, b_sin, G: tl.constexpr, N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr,
    UP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """B or C of one head: normalised, biased, rotated; three pieces [r, a], [r, a], [r, u] in float32."""
    o_r, o_a, o_u = tl.arange(0, RP)[:, None], tl.arange(0, AP)[None, :], tl.arange(0, UP)[None, :]
    m_a, m_u = (o_r < R) & (o_a < A), (o_r < R) & (o_u < N - 2 * A)
    p_v = v + (o_r * G + i_g) * N
    b_1 = tl.load(p_v + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_2 = tl.load(p_v + A + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_3 = tl.load(p_v + 2 * A + o_u, mask=m_u, other=0.0).to(tl.float32)
    b_scale = tl.rsqrt((tl.sum(b_1 * b_1 + b_2 * b_2, axis=1) + tl.sum(b_3 * b_3, axis=1)) / N + EPS)[:, None]
    b_1 *= b_scale * tl.load(weight + o_a, mask=o_a < A, other=0.0).to(tl.float32)
    b_2 *= b_scale * tl.load(weight + A + o_a, mask=o_a < A, other=0.0).to(tl.float32)
    b_3 *= b_scale * tl.load(weight + 2 * A + o_u, mask=o_u < N - 2 * A, other=0.0).to(tl.float32)
    if HAS_BIAS:
        p_bias = bias + (i_h * R + o_r) * N
        b_1 += tl.load(p_bias + o_a, mask=m_a, other=0.0)
        b_2 += tl.load(p_bias + A + o_a, mask=m_a, other=0.0)
        b_3 += tl.load(p_bias + 2 * A + o_u, mask=m_u, other=0.0)
    return b_1 * b_cos - b_2 * b_sin, b_1 * b_sin + b_2 * b_cos, b_3


@triton.jit
def _put_vectors(
    p, b_1, b_2, b_3, H: tl.constexpr, N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """The three pieces of `_vectors` to p [r, h, n], p at the head."""
    o_r, o_a, o_u = tl.arange(0, RP)[:, None], tl.arange(0, AP)[None, :], tl.arange(0, UP)[None, :]
    m_a, m_u = (o_r < R) & (o_a < A), (o_r < R) & (o_u < N - 2 * A)
    p += o_r * (H * N)
    dtype = p.dtype.element_ty
    tl.store(p + o_a, b_1.to(dtype), mask=m_a)
    tl.store(p + A + o_a, b_2.to(dtype), mask=m_a)
    tl.store(p + 2 * A + o_u, b_3.to(dtype), mask=m_u)


@triton.jit
def decode_ranks_kernel(
    row, dt_bias, B_weight, C_weight, B_bias, C_bias, mimo_x, mimo_z, mimo_o, D, phi, S, B_prev, x_prev, C_now, y, live,
    row_size,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, N: tl.constexpr,
    HALF: tl.constexpr, W: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, RP: tl.constexpr,
    A_FLOOR: tl.constexpr, HEAVY_TAIL: tl.constexpr, LAM: tl.constexpr, HAS_BIAS_B: tl.constexpr,
    HAS_BIAS_C: tl.constexpr, HAS_MIMO: tl.constexpr, HAS_D: tl.constexpr, HAS_LIVE: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """One program a (head, sequence). row [b, row_size]: z, x, B, C, dt, A, lam, theta. LAM: a fixed lam, or -1."""
    i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_LIVE:  # noqa: SIM102, the compiler drops the outer branch
        if padding(y, live, i_b * H + i_h, i_b, P, PP, AHEAD):
            return
    i_g = i_h // (H // G)
    Z: tl.constexpr = H * P
    BC: tl.constexpr = R * G * N
    O_DT: tl.constexpr = 2 * Z + 2 * BC
    O_THETA: tl.constexpr = O_DT + (3 if LAM < 0 else 2) * H
    o_p, o_a = tl.arange(0, PP)[:, None, None], tl.arange(0, AP)
    m_p, m_a = o_p < P, o_a < A
    o_0 = tl.arange(0, HALF // W)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    o_1 = HALF + o_0
    m_0, m_1 = o_0 < N, o_1 < N
    p_row = row + i_b * row_size
    i_bh = i_b * H + i_h

    # The state is asked for first: everything below is worked out while it arrives.
    p_S = S + i_bh * (P * N) + o_p * N
    b_S0 = tl.load(p_S + o_0, mask=m_p & m_0, other=0.0).to(tl.float32)
    b_S1 = tl.load(p_S + o_1, mask=m_p & m_1, other=0.0).to(tl.float32)
    if AHEAD:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()

    alpha, beta, gamma, dt = activations(p_row + O_DT, dt_bias, i_h, H, A_FLOOR, HEAVY_TAIL, LAM)
    p_phi = phi + i_bh * A + o_a
    b_phi, b_cos, b_sin = moved_angle(p_phi, p_row + O_THETA + o_a, dt, m_a)
    b_cos, b_sin = b_cos[None, :], b_sin[None, :]
    b_B1, b_B2, b_B3 = _vectors(
        p_row + 2 * Z, B_weight, B_bias, i_h, i_g, b_cos, b_sin, G, N, A, AP, UP, R, RP, HAS_BIAS_B
    )
    b_C1, b_C2, b_C3 = _vectors(
        p_row + 2 * Z + BC, C_weight, C_bias, i_h, i_g, b_cos, b_sin, G, N, A, AP, UP, R, RP, HAS_BIAS_C
    )

    o_rhn = (i_b * (R * H) + i_h) * N
    b_old = tl.load(x_prev + i_bh * P + o_p, mask=m_p, other=0.0).to(tl.float32) * beta
    b_S0, b_S1 = b_S0 * alpha, b_S1 * alpha
    for i_r in tl.static_range(R):
        b_x = b_old
        if HAS_MIMO:
            b_x = b_old * tl.load(mimo_x + (i_h * R + i_r) * P + o_p, mask=m_p, other=0.0)
        p_B = B_prev + o_rhn + i_r * (H * N)
        b_S0 += b_x * tl.load(p_B + o_0, mask=m_0, other=0.0).to(tl.float32)
        b_S1 += b_x * tl.load(p_B + o_1, mask=m_1, other=0.0).to(tl.float32)
    b_new = tl.load(p_row + Z + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    # Several threads hold the same element of a vector: all must have read before one overwrites it.
    tl.debug_barrier()
    tl.store(p_phi, b_phi, mask=m_a)
    tl.store(x_prev + i_bh * P + o_p, b_new.to(x_prev.dtype.element_ty), mask=m_p)
    _put_vectors(B_prev + o_rhn, b_B1, b_B2, b_B3, H, N, A, AP, UP, R, RP)
    _put_vectors(C_now + o_rhn, b_C1, b_C2, b_C3, H, N, A, AP, UP, R, RP)
    tl.debug_barrier()  # what the program has written, all of it reads

    b_new *= gamma
    for i_r in tl.static_range(R):
        b_x = b_new
        if HAS_MIMO:
            b_x = b_new * tl.load(mimo_x + (i_h * R + i_r) * P + o_p, mask=m_p, other=0.0)
        p_B = B_prev + o_rhn + i_r * (H * N)
        b_S0 += b_x * tl.load(p_B + o_0, mask=m_0, other=0.0).to(tl.float32)
        b_S1 += b_x * tl.load(p_B + o_1, mask=m_1, other=0.0).to(tl.float32)
    tl.store(p_S + o_0, narrow(b_S0, S.dtype.element_ty), mask=m_p & m_0)
    tl.store(p_S + o_1, narrow(b_S1, S.dtype.element_ty), mask=m_p & m_1)

    o_p = tl.arange(0, PP)
    m_p = o_p < P
    b_x = tl.load(p_row + Z + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_z = tl.load(p_row + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_out = tl.zeros((PP,), tl.float32)
    for i_r in tl.static_range(R):
        p_C = C_now + o_rhn + i_r * (H * N)
        b_C0 = tl.load(p_C + o_0, mask=m_0, other=0.0).to(tl.float32)
        b_C1 = tl.load(p_C + o_1, mask=m_1, other=0.0).to(tl.float32)
        b_y = tl.sum(tl.sum(b_S0 * b_C0 + b_S1 * b_C1, axis=1), axis=1)
        o_mimo = (i_h * R + i_r) * P + o_p
        b_xr, b_zr = b_x, b_z
        if HAS_MIMO:
            b_xr = b_x * tl.load(mimo_x + o_mimo, mask=m_p, other=0.0)
            b_zr = b_z * tl.load(mimo_z + o_mimo, mask=m_p, other=0.0)
        if HAS_D:
            b_y += tl.load(D + i_h) * b_xr
        b_y *= b_zr * sigmoid(b_zr)
        if HAS_MIMO:
            b_y *= tl.load(mimo_o + o_mimo, mask=m_p, other=0.0)
        b_out += b_y
    tl.store(y + i_bh * P + o_p, b_out.to(y.dtype.element_ty), mask=m_p)
