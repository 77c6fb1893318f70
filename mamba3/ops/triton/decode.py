# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""One token of a layer between its two projections, in one kernel: from the row that in_proj gives to what out_proj takes.

Activations (softplus, decay, sigmoid, pi tanh), RMSNorm of B and C, biases, angle, rotation, state update, readout, D, gate
and contraction over ranks (mathematics.md, sections 1 to 4 and 6). The state is read and written once, in place: a step's
time is that of moving it. A state kept in 16 bits is rounded stochastically: the bits that decide are a hash of the value
that is rounded, so that the expected value is kept, equal inputs give equal bits, and a CUDA graph needs no seed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba3.ops.triton.angles import LOG2_E, RADIANS_PER_TURN, TURNS_PER_RADIAN, cos_sin, wrapped
from mamba3.ops.triton.launch import padded
from mamba3.ops.types import State

EPS = tl.constexpr(1e-5)


@triton.jit
def _softplus(v):
    return tl.where(v > 20.0, v, tl.log2(1.0 + tl.exp2(tl.minimum(v, 20.0) * LOG2_E)) / LOG2_E)


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-v * LOG2_E))


@triton.jit
def _tanh(v):
    return 1.0 - 2.0 / (1.0 + tl.exp2(2.0 * v * LOG2_E))


@triton.jit
def _vectors(
    row, weight, bias, scale, o_row, i_h, i_r, b_cos, b_sin, N: tl.constexpr, A: tl.constexpr, AP: tl.constexpr,
    UP: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """B or C of one rank and head: normalised, biased, rotated; three pieces [a], [a], [u] in float32."""
    o_a, o_u = tl.arange(0, AP), tl.arange(0, UP)
    m_a, m_u = o_a < A, o_u < N - 2 * A
    p = row + o_row
    b_1 = tl.load(p + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_2 = tl.load(p + A + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_3 = tl.load(p + 2 * A + o_u, mask=m_u, other=0.0).to(tl.float32)
    b_1 *= scale * tl.load(weight + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_2 *= scale * tl.load(weight + A + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_3 *= scale * tl.load(weight + 2 * A + o_u, mask=m_u, other=0.0).to(tl.float32)
    if HAS_BIAS:
        p_bias = bias + (i_h * R + i_r) * N
        b_1 += tl.load(p_bias + o_a, mask=m_a, other=0.0)
        b_2 += tl.load(p_bias + A + o_a, mask=m_a, other=0.0)
        b_3 += tl.load(p_bias + 2 * A + o_u, mask=m_u, other=0.0)
    return b_1 * b_cos - b_2 * b_sin, b_1 * b_sin + b_2 * b_cos, b_3


@triton.jit
def _scales(row, i_g, Z: tl.constexpr, G: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr,
            RP: tl.constexpr):  # fmt: skip
    """1 / rms over n of B (ranks 0..RP) and C (RP..2 RP): one reduction for all."""
    o_i, o_n = tl.arange(0, 2 * RP), tl.arange(0, NP)
    o_vector = ((o_i // RP * R + o_i % RP) * G + i_g) * N
    m = (o_i % RP < R)[:, None] & (o_n < N)[None, :]
    b_v = tl.load(row + 2 * Z + (o_vector[:, None] + o_n[None, :]), mask=m, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(b_v * b_v, axis=1) / N + EPS)


@triton.jit
def _narrow(b_S, dtype: tl.constexpr):
    """float32 to the dtype of the state; bfloat16 by stochastic rounding."""
    if dtype == tl.bfloat16:
        bits = b_S.to(tl.uint32, bitcast=True)
        noise = (bits ^ (bits >> 15)) * 0x2C1B3C6D
        noise = (noise ^ (noise >> 12)) * 0x297A2D39
        return ((bits + (noise >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return b_S.to(dtype)


@triton.jit
def decode_kernel(
    row, dt_bias, B_weight, C_weight, B_bias, C_bias, mimo_x, mimo_z, mimo_o, D, phi, S, B_prev, x_prev, y, row_size,
    H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, N: tl.constexpr,
    NP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, RP: tl.constexpr, A_FLOOR: tl.constexpr,
    HEAVY_TAIL: tl.constexpr, LAM: tl.constexpr, HAS_BIAS_B: tl.constexpr, HAS_BIAS_C: tl.constexpr, HAS_MIMO: tl.constexpr,
    HAS_D: tl.constexpr,
):  # fmt: skip
    """One program a (head, sequence). row [b, row_size]: z, x, B, C, dt, A, lam, theta. LAM: a fixed lam, or -1."""
    i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_g = i_h // (H // G)
    Z: tl.constexpr = H * P
    BC: tl.constexpr = R * G * N
    O_DT: tl.constexpr = 2 * Z + 2 * BC
    O_THETA: tl.constexpr = O_DT + (3 if LAM < 0 else 2) * H
    o_p, o_a, o_u = tl.arange(0, PP), tl.arange(0, AP), tl.arange(0, UP)
    m_p, m_a, m_u = o_p < P, o_a < A, o_u < N - 2 * A
    p_row = row + i_b * row_size
    i_bh = i_b * H + i_h

    # The state is asked for first: everything below is worked out while it arrives.
    p_S = S + i_bh * (P * N) + o_p[:, None] * N
    b_S1 = tl.load(p_S + o_a[None, :], mask=m_p[:, None] & m_a[None, :], other=0.0).to(tl.float32)
    b_S2 = tl.load(p_S + (A + o_a)[None, :], mask=m_p[:, None] & m_a[None, :], other=0.0).to(tl.float32)
    b_S3 = tl.load(p_S + (2 * A + o_u)[None, :], mask=m_p[:, None] & m_u[None, :], other=0.0).to(tl.float32)

    dt = _softplus(tl.load(p_row + O_DT + i_h).to(tl.float32) + tl.load(dt_bias + i_h))
    raw = tl.load(p_row + O_DT + H + i_h).to(tl.float32)
    if HEAVY_TAIL:  # noqa: SIM108, the compiler drops the other branch
        rate = tl.maximum(raw, 0.0) + 1.0 / (1.0 - tl.minimum(raw, 0.0))
    else:
        rate = _softplus(raw)
    alpha = tl.exp2(-tl.maximum(rate, A_FLOOR) * dt * LOG2_E)
    lam = LAM
    if LAM < 0:
        lam = _sigmoid(tl.load(p_row + O_DT + 2 * H + i_h).to(tl.float32))
    beta, gamma = (1.0 - lam) * dt * alpha, lam * dt

    p_phi = phi + i_bh * A + o_a
    b_theta = 0.5 * _tanh(tl.load(p_row + O_THETA + o_a, mask=m_a, other=0.0).to(tl.float32))  # turns per unit of dt
    b_turn = wrapped(tl.load(p_phi, mask=m_a, other=0.0) * TURNS_PER_RADIAN + b_theta * dt)
    b_cos, b_sin = cos_sin(b_turn, False)

    b_scales, o_i = _scales(p_row, i_g, Z, G, N, NP, R, RP), tl.arange(0, 2 * RP)
    b_x = tl.load(p_row + Z + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_old = tl.load(x_prev + i_bh * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_S1, b_S2, b_S3 = b_S1 * alpha, b_S2 * alpha, b_S3 * alpha
    for i_r in tl.static_range(R):
        b_old_r = b_old * beta
        if HAS_MIMO:
            b_old_r *= tl.load(mimo_x + (i_h * R + i_r) * P + o_p, mask=m_p, other=0.0)
        p_B = B_prev + ((i_b * R + i_r) * H + i_h) * N
        b_S1 += b_old_r[:, None] * tl.load(p_B + o_a, mask=m_a, other=0.0).to(tl.float32)[None, :]
        b_S2 += b_old_r[:, None] * tl.load(p_B + A + o_a, mask=m_a, other=0.0).to(tl.float32)[None, :]
        b_S3 += b_old_r[:, None] * tl.load(p_B + 2 * A + o_u, mask=m_u, other=0.0).to(tl.float32)[None, :]
    # Several threads hold the same element of a vector: all must have read before one overwrites it.
    tl.debug_barrier()
    tl.store(p_phi, b_turn * RADIANS_PER_TURN, mask=m_a)
    tl.store(x_prev + i_bh * P + o_p, b_x.to(x_prev.dtype.element_ty), mask=m_p)
    for i_r in tl.static_range(R):
        b_new_r = b_x * gamma
        if HAS_MIMO:
            b_new_r *= tl.load(mimo_x + (i_h * R + i_r) * P + o_p, mask=m_p, other=0.0)
        scale = tl.sum(tl.where(o_i == i_r, b_scales, 0.0))
        b_B1, b_B2, b_B3 = _vectors(p_row, B_weight, B_bias, scale, 2 * Z + (i_r * G + i_g) * N, i_h, i_r, b_cos, b_sin,
                                    N, A, AP, UP, R, HAS_BIAS_B)  # fmt: skip
        p_B = B_prev + ((i_b * R + i_r) * H + i_h) * N
        dtype = B_prev.dtype.element_ty
        b_B1, b_B2, b_B3 = b_B1.to(dtype), b_B2.to(dtype), b_B3.to(dtype)
        tl.store(p_B + o_a, b_B1, mask=m_a)
        tl.store(p_B + A + o_a, b_B2, mask=m_a)
        tl.store(p_B + 2 * A + o_u, b_B3, mask=m_u)
        b_S1 += b_new_r[:, None] * b_B1.to(tl.float32)[None, :]
        b_S2 += b_new_r[:, None] * b_B2.to(tl.float32)[None, :]
        b_S3 += b_new_r[:, None] * b_B3.to(tl.float32)[None, :]

    state_dtype: tl.constexpr = S.dtype.element_ty
    tl.store(p_S + o_a[None, :], _narrow(b_S1, state_dtype), mask=m_p[:, None] & m_a[None, :])
    tl.store(p_S + (A + o_a)[None, :], _narrow(b_S2, state_dtype), mask=m_p[:, None] & m_a[None, :])
    tl.store(p_S + (2 * A + o_u)[None, :], _narrow(b_S3, state_dtype), mask=m_p[:, None] & m_u[None, :])

    b_z = tl.load(p_row + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_out = tl.zeros((PP,), tl.float32)
    for i_r in tl.static_range(R):
        scale = tl.sum(tl.where(o_i == RP + i_r, b_scales, 0.0))
        b_C1, b_C2, b_C3 = _vectors(p_row, C_weight, C_bias, scale, 2 * Z + BC + (i_r * G + i_g) * N, i_h, i_r, b_cos, b_sin,
                                    N, A, AP, UP, R, HAS_BIAS_C)  # fmt: skip
        b_y = tl.sum(b_S1 * b_C1[None, :] + b_S2 * b_C2[None, :], axis=1) + tl.sum(b_S3 * b_C3[None, :], axis=1)
        o_mimo = (i_h * R + i_r) * P + o_p
        b_xr, b_zr = b_x, b_z
        if HAS_MIMO:
            b_xr = b_x * tl.load(mimo_x + o_mimo, mask=m_p, other=0.0)
            b_zr = b_z * tl.load(mimo_z + o_mimo, mask=m_p, other=0.0)
        if HAS_D:
            b_y += tl.load(D + i_h) * b_xr
        b_y *= b_zr * _sigmoid(b_zr)
        if HAS_MIMO:
            b_y *= tl.load(mimo_o + o_mimo, mask=m_p, other=0.0)
        b_out += b_y
    tl.store(y + i_bh * P + o_p, b_out.to(y.dtype.element_ty), mask=m_p)


class Parameters(NamedTuple):
    """What one layer's step needs beside the row and the state; float32 and contiguous except the norm weights.

    dt_bias, D [h]; B_weight, C_weight [n] of the two norms; B_bias, C_bias [h, r, n]; mimo_* [h, r, p], all or none;
    decay "heavy_tail" or "softplus"; lam a fixed weight of the current token, or None where the row holds it.
    """

    dt_bias: Tensor
    B_weight: Tensor
    C_weight: Tensor
    B_bias: Tensor | None
    C_bias: Tensor | None
    mimo_x: Tensor | None
    mimo_z: Tensor | None
    mimo_o: Tensor | None
    D: Tensor | None
    ngroups: int
    rank: int
    decay: str
    A_floor: float
    lam: float | None


def decode(row: Tensor, parameters: Parameters, state: State, num_warps: int = 2) -> Tensor:
    """row [b, projected] to y [b, h, p] in the dtype of row; `state` moves on in place. No gradient.

    Raises ValueError where the row's width does not fit the state and the parameters.
    """
    q = parameters
    b, H, P, N = state.S.shape
    A = state.phi.shape[-1]
    width = 2 * H * P + 2 * q.rank * q.ngroups * N + (3 if q.lam is None else 2) * H + A
    if row.shape != (b, width):
        raise ValueError(
            f"row must have shape {(b, width)} for this state and these parameters; it has {tuple(row.shape)}."
        )
    shapes = ((b, H, A), (b, H, P, N), (b, q.rank, H, N), (b, H, P))
    if tuple(v.shape for v in state[:4]) != shapes or any(v.device != row.device for v in state[:4]):
        raise ValueError(
            f"phi, S, B_prev and x_prev must have shapes {shapes} on {row.device}; check the state's layer."
        )
    if not all(v.is_contiguous() for v in (row, *state[:4])):
        raise ValueError("row and state must be contiguous; the state is updated in place.")
    y = torch.empty(b, H, P, device=row.device, dtype=row.dtype)
    decode_kernel[(H, b)](
        row, q.dt_bias, q.B_weight, q.C_weight, q.B_bias, q.C_bias, q.mimo_x, q.mimo_z, q.mimo_o, q.D,
        state.phi, state.S, state.B_prev, state.x_prev, y, width,
        H=H, G=q.ngroups, R=q.rank, P=P, PP=padded(P), N=N, A=A, AP=padded(A), UP=padded(N - 2 * A),
        NP=triton.next_power_of_2(N), RP=triton.next_power_of_2(q.rank), A_FLOOR=q.A_floor,
        HEAVY_TAIL=q.decay == "heavy_tail", LAM=-1.0 if q.lam is None else float(q.lam),
        HAS_BIAS_B=q.B_bias is not None, HAS_BIAS_C=q.C_bias is not None, HAS_MIMO=q.mimo_x is not None,
        HAS_D=q.D is not None, num_warps=num_warps,
    )  # fmt: skip
    return y
