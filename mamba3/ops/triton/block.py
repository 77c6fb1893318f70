# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""What a block of a model does beside its matrix products, each in one pass over its rows; without gradients.

    add_norm       h <- h + y,  u = h / rms(h) * weight
    swiglu         value * silu(gate)  from rows [value | gate]
    activations    the in_proj row as the recurrence takes it: dt, A, lam, theta and the normalised B and C (mathematics.md,
                   section 1)

In PyTorch the first moves 48 bytes a channel for 24, the second 10 for 6, and the third is some thirty small kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba3.ops.triton.again import launcher
from mamba3.ops.triton.decode_token import EPS, PI, decay_rate, sigmoid, softplus, tanh
from mamba3.ops.triton.launch import cdiv, power_of_2, side_by_side


@triton.jit
def add_norm_kernel(h, y, weight, u, total, eps, N: tl.constexpr, BLOCK: tl.constexpr, HAS_Y: tl.constexpr):
    """One program a row. u [rows, n] = norm(h + y); total [rows, n] = h + y."""
    i_row, o_n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    m_n = o_n < N
    b_h = tl.load(h + i_row * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    if HAS_Y:
        b_h += tl.load(y + i_row * N + o_n, mask=m_n, other=0.0).to(tl.float32)
        narrow = b_h.to(total.dtype.element_ty)  # what is normalised is what is kept
        tl.store(total + i_row * N + o_n, narrow, mask=m_n)
        b_h = narrow.to(tl.float32)
    b_u = b_h * tl.rsqrt(tl.sum(b_h * b_h) / N + eps)
    b_u *= tl.load(weight + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(u + i_row * N + o_n, b_u.to(u.dtype.element_ty), mask=m_n)


@triton.jit
def swiglu_kernel(v, out, N: tl.constexpr, BLOCK: tl.constexpr):
    """One program a (row, BLOCK channels). v [rows, value n, gate n], out [rows, n]."""
    i_row, o_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_v = tl.load(v + i_row * (2 * N) + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_gate = tl.load(v + i_row * (2 * N) + N + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(out + i_row * N + o_n, (b_v * b_gate * sigmoid(b_gate)).to(out.dtype.element_ty), mask=m_n)


@triton.jit
def _normalised(v, weight, out, N: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """Rows [m, n] over their rms, times weight [n]."""
    o_m, o_n = tl.arange(0, MP)[:, None], tl.arange(0, NP)[None, :]
    m = (o_m < M) & (o_n < N)
    b_v = tl.load(v + o_m * N + o_n, mask=m, other=0.0).to(tl.float32)
    b_v *= tl.rsqrt(tl.sum(b_v * b_v, axis=1) / N + EPS)[:, None]
    b_v *= tl.load(weight + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    tl.store(out + o_m * N + o_n, b_v.to(out.dtype.element_ty), mask=m)


@triton.jit
def activations_kernel(
    B_raw, C_raw, dt_raw, A_raw, lam_raw, theta_raw, dt_bias, B_weight, C_weight, B, C, dt, A_rate, lam, theta, bc_row,
    rest_row, H: tl.constexpr, HP: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, A_FLOOR: tl.constexpr, HEAVY_TAIL: tl.constexpr, LAM: tl.constexpr,
):  # fmt: skip
    """One program a token. bc_row, rest_row: elements from a token's columns to the next's; M = r g. LAM: fixed, or -1."""
    i_t, o_h, o_a = tl.program_id(0).to(tl.int64), tl.arange(0, HP), tl.arange(0, AP)
    m_h, m_a = o_h < H, o_a < A
    p_row, p_h = i_t * rest_row + o_h, i_t * H + o_h
    b_dt = tl.load(dt_raw + p_row, mask=m_h, other=0.0).to(tl.float32) + tl.load(dt_bias + o_h, mask=m_h, other=0.0)
    tl.store(dt + p_h, softplus(b_dt), mask=m_h)
    b_A = decay_rate(tl.load(A_raw + p_row, mask=m_h, other=0.0).to(tl.float32), A_FLOOR, HEAVY_TAIL)
    tl.store(A_rate + p_h, -b_A, mask=m_h)
    if LAM < 0:
        b_lam = sigmoid(tl.load(lam_raw + p_row, mask=m_h, other=0.0).to(tl.float32))
    else:
        b_lam = tl.full((HP,), LAM, tl.float32)
    tl.store(lam + p_h, b_lam, mask=m_h)
    if A > 0:
        b_theta = tl.load(theta_raw + i_t * rest_row + o_a, mask=m_a, other=0.0).to(tl.float32)
        tl.store(theta + i_t * A + o_a, tanh(b_theta) * PI, mask=m_a)
    _normalised(B_raw + i_t * bc_row, B_weight, B + i_t * (M * N), N, NP, M, MP)
    _normalised(C_raw + i_t * bc_row, C_weight, C + i_t * (M * N), N, NP, M, MP)


def add_norm(h: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(norm(h + y) in `dtype`, h + y in the dtype of h) of h, y [..., n]; h itself where there is no y."""
    h = h.contiguous()
    n = h.shape[-1]
    u, total = torch.empty(h.shape, device=h.device, dtype=dtype), h if y is None else torch.empty_like(h)
    BLOCK = power_of_2(n)
    launcher(add_norm_kernel, (h.numel() // n,))(
        h, None if y is None else y.contiguous(), weight, u, total, eps, N=n, BLOCK=BLOCK, HAS_Y=y is not None,
        num_warps=min(8, max(1, BLOCK // 512)),
    )  # fmt: skip
    return u, total


def swiglu(v: Tensor) -> Tensor:
    """value * silu(gate) of v [..., value n, gate n]."""
    v = v.contiguous()
    n = v.shape[-1] // 2
    out = torch.empty(*v.shape[:-1], n, device=v.device, dtype=v.dtype)
    BLOCK = min(2048, power_of_2(n))
    launcher(swiglu_kernel, (out.numel() // n, cdiv(n, BLOCK)))(v, out, N=n, BLOCK=BLOCK, num_warps=4)
    return out


def activations(
    B: Tensor, C: Tensor, dt: Tensor, A: Tensor, lam: Tensor, theta: Tensor, dt_bias: Tensor, B_weight: Tensor,
    C_weight: Tensor, *, groups: tuple[int, int, int], decay: str, A_floor: float, fixed_lam: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dt, A, lam [b, t, h], theta [b, t, a] in float32 and B, C [b, t, r, g, n] of columns [b, t, ...] of a projection.

    B and C may be columns of another tensor than dt, A, lam and theta. lam is empty where it is fixed.
    """
    (b, t, h), a, (r, g, n) = dt.shape, theta.shape[-1], groups
    single = {"device": dt.device, "dtype": torch.float32}
    out = [*side_by_side(3, (b, t, h), **single), torch.empty(b, t, a, **single)]
    vectors = side_by_side(2, (b, t, r, g, n), device=B.device, dtype=B.dtype)
    launcher(activations_kernel, (b * t,))(
        B, C, dt, A, lam, theta, dt_bias, B_weight, C_weight, *vectors, *out, B.stride(1), dt.stride(1), H=h,
        HP=power_of_2(h), A=a, AP=power_of_2(max(1, a)), N=n, NP=power_of_2(n),
        M=r * g, MP=power_of_2(r * g), A_FLOOR=A_floor, HEAVY_TAIL=decay == "heavy_tail",
        LAM=-1.0 if fixed_lam is None else fixed_lam, num_warps=1 if r * g * n <= 256 else 2,
    )  # fmt: skip
    return *out, *vectors
