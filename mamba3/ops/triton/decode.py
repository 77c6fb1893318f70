# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""One token of a layer between its two projections, in one kernel: from the row that in_proj gives to what out_proj takes.

Activations (softplus, decay, sigmoid, pi tanh), RMSNorm of B and C, biases, angle, rotation, state update, readout, D, gate
and contraction over ranks (mathematics.md, sections 1 to 4 and 6). The state is read and written once, in place: a step's
time is that of moving it. A state kept in 16 bits is rounded stochastically: the bits that decide are a hash of the value
that is rounded, so that the expected value is kept, equal inputs give equal bits, and a CUDA graph needs no seed.

Beside `few_rows` the state is asked for before the kernel in front has ended (programmatic dependent launch); of that one the
step needs the row alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from mamba3.ops.triton.decode_ranks import decode_ranks_kernel
from mamba3.ops.triton.decode_token import EPS, activations, moved_angle, narrow, padding, sigmoid
from mamba3.ops.triton.few_rows import MOST_ROWS
from mamba3.ops.triton.launch import device_limits, padded, power_of_2
from mamba3.ops.types import State


@triton.jit
def _scale(v, N: tl.constexpr, NP: tl.constexpr):
    """1 / rms over n of a vector."""
    o_n = tl.arange(0, NP)
    b_v = tl.load(v + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(b_v * b_v) / N + EPS)


@triton.jit
def _vector(
    v, weight, bias, i_h, b_cos, b_sin, N: tl.constexpr, NP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr,
    UP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """B or C of a head: normalised, biased, rotated; three pieces [a], [a], [u] in float32."""
    o_a, o_u = tl.arange(0, AP), tl.arange(0, UP)
    m_a, m_u = o_a < A, o_u < N - 2 * A
    scale = _scale(v, N, NP)
    b_1 = tl.load(v + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_2 = tl.load(v + A + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_3 = tl.load(v + 2 * A + o_u, mask=m_u, other=0.0).to(tl.float32)
    b_1 *= scale * tl.load(weight + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_2 *= scale * tl.load(weight + A + o_a, mask=m_a, other=0.0).to(tl.float32)
    b_3 *= scale * tl.load(weight + 2 * A + o_u, mask=m_u, other=0.0).to(tl.float32)
    if HAS_BIAS:
        p_bias = bias + i_h * N
        b_1 += tl.load(p_bias + o_a, mask=m_a, other=0.0)
        b_2 += tl.load(p_bias + A + o_a, mask=m_a, other=0.0)
        b_3 += tl.load(p_bias + 2 * A + o_u, mask=m_u, other=0.0)
    return b_1 * b_cos - b_2 * b_sin, b_1 * b_sin + b_2 * b_cos, b_3


@triton.jit
def decode_kernel(
    row, dt_bias, B_weight, C_weight, B_bias, C_bias, D, phi, S, B_prev, x_prev, y, live, row_size,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    A: tl.constexpr, AP: tl.constexpr, UP: tl.constexpr, A_FLOOR: tl.constexpr, HEAVY_TAIL: tl.constexpr,
    LAM: tl.constexpr, HAS_BIAS_B: tl.constexpr, HAS_BIAS_C: tl.constexpr, HAS_D: tl.constexpr, HAS_LIVE: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """One rank. One program a (head, sequence). row [b, row_size]: z, x, B, C, dt, A, lam, theta. LAM: a fixed lam, or -1."""
    i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if HAS_LIVE:  # noqa: SIM102, the compiler drops the outer branch
        if padding(y, live, i_b * H + i_h, i_b, P, PP, AHEAD):
            return
    i_g = i_h // (H // G)
    Z: tl.constexpr = H * P
    BC: tl.constexpr = G * N
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
    if AHEAD:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()

    alpha, beta, gamma, dt = activations(p_row + O_DT, dt_bias, i_h, H, A_FLOOR, HEAVY_TAIL, LAM)
    p_phi = phi + i_bh * A + o_a
    b_phi, b_cos, b_sin = moved_angle(p_phi, p_row + O_THETA + o_a, dt, m_a)
    p_B = p_row + 2 * Z + i_g * N
    b_B1, b_B2, b_B3 = _vector(p_B, B_weight, B_bias, i_h, b_cos, b_sin, N, NP, A, AP, UP, HAS_BIAS_B)
    b_C1, b_C2, b_C3 = _vector(p_B + BC, C_weight, C_bias, i_h, b_cos, b_sin, N, NP, A, AP, UP, HAS_BIAS_C)
    b_x = tl.load(p_row + Z + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_old = tl.load(x_prev + i_bh * P + o_p, mask=m_p, other=0.0).to(tl.float32) * beta
    p_B = B_prev + i_bh * N
    b_S1 = b_S1 * alpha + b_old[:, None] * tl.load(p_B + o_a, mask=m_a, other=0.0).to(tl.float32)[None, :]
    b_S2 = b_S2 * alpha + b_old[:, None] * tl.load(p_B + A + o_a, mask=m_a, other=0.0).to(tl.float32)[None, :]
    b_S3 = b_S3 * alpha + b_old[:, None] * tl.load(p_B + 2 * A + o_u, mask=m_u, other=0.0).to(tl.float32)[None, :]
    # Several threads hold the same element of a vector: all must have read before one overwrites it.
    tl.debug_barrier()
    dtype: tl.constexpr = B_prev.dtype.element_ty
    b_B1, b_B2, b_B3 = b_B1.to(dtype), b_B2.to(dtype), b_B3.to(dtype)
    tl.store(p_phi, b_phi, mask=m_a)
    tl.store(x_prev + i_bh * P + o_p, b_x.to(x_prev.dtype.element_ty), mask=m_p)
    tl.store(p_B + o_a, b_B1, mask=m_a)
    tl.store(p_B + A + o_a, b_B2, mask=m_a)
    tl.store(p_B + 2 * A + o_u, b_B3, mask=m_u)
    b_new = b_x * gamma
    b_S1 += b_new[:, None] * b_B1.to(tl.float32)[None, :]
    b_S2 += b_new[:, None] * b_B2.to(tl.float32)[None, :]
    b_S3 += b_new[:, None] * b_B3.to(tl.float32)[None, :]
    state_dtype: tl.constexpr = S.dtype.element_ty
    tl.store(p_S + o_a[None, :], narrow(b_S1, state_dtype), mask=m_p[:, None] & m_a[None, :])
    tl.store(p_S + (A + o_a)[None, :], narrow(b_S2, state_dtype), mask=m_p[:, None] & m_a[None, :])
    tl.store(p_S + (2 * A + o_u)[None, :], narrow(b_S3, state_dtype), mask=m_p[:, None] & m_u[None, :])

    b_z = tl.load(p_row + i_h * P + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_y = tl.sum(b_S1 * b_C1[None, :] + b_S2 * b_C2[None, :], axis=1) + tl.sum(b_S3 * b_C3[None, :], axis=1)
    if HAS_D:
        b_y += tl.load(D + i_h) * b_x
    tl.store(y + i_bh * P + o_p, (b_y * b_z * sigmoid(b_z)).to(y.dtype.element_ty), mask=m_p)


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


def decode(
    row: Tensor, parameters: Parameters, state: State, live: Tensor | None = None, *, ahead: bool = False
) -> Tensor:
    """row [b, projected] to y [b, h, p] in the dtype of row; `state` moves on in place. No gradient.

    live [1] int32 on the device: of the sequences the first so many; the others are padding, whose state is neither read nor
    written and whose y is 0. ahead: the kernel in front has written row and nothing of the state, which may then be read before
    it has ended.

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
    constants = dict(
        H=H, G=q.ngroups, P=P, PP=padded(P), N=N, A=A, AP=padded(A), UP=padded(N - 2 * A), A_FLOOR=q.A_floor,
        HEAVY_TAIL=q.decay == "heavy_tail", LAM=-1.0 if q.lam is None else float(q.lam),
        HAS_BIAS_B=q.B_bias is not None, HAS_BIAS_C=q.C_bias is not None, HAS_D=q.D is not None,
        HAS_LIVE=live is not None, AHEAD=ahead and b <= MOST_ROWS and device_limits(row.device).capability[0] >= 9,
    )  # fmt: skip
    launch = {"launch_pdl": True} if constants["AHEAD"] else {}
    if q.rank == 1 and q.mimo_x is None:
        decode_kernel[(H, b)](
            row, q.dt_bias, q.B_weight, q.C_weight, q.B_bias, q.C_bias, q.D, state.phi, state.S, state.B_prev,
            state.x_prev, y, live, width, NP=power_of_2(N), num_warps=2, **constants, **launch,
        )  # fmt: skip
        return y
    C_now = torch.empty(b, q.rank, H, N, device=row.device, dtype=row.dtype)
    half = max(1, power_of_2(N) // 2)
    decode_ranks_kernel[(H, b)](
        row, q.dt_bias, q.B_weight, q.C_weight, q.B_bias, q.C_bias, q.mimo_x, q.mimo_z, q.mimo_o, q.D, state.phi,
        state.S, state.B_prev, state.x_prev, C_now, y, live, width, R=q.rank, RP=power_of_2(q.rank), HALF=half,
        W=min(32, half), HAS_MIMO=q.mimo_x is not None, num_warps=4, **constants, **launch,
    )  # fmt: skip
    return y
