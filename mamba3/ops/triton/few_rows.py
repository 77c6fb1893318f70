# type: ignore  the bodies of kernels are Triton, which only looks like Python
"""Products of a weight matrix with one row or two, in the time that reading the matrix takes; without gradients.

    y = u W^T,    u given, or u = norm(h + add) as in `block.add_norm`;    y = value * silu(gate) where W is [value; gate]

A program reads a few rows of W whole. On Hopper it asks for them before the kernel in front of it has ended, of which it needs
u alone (programmatic dependent launch; the kernel in front must not be one that writes W). What lies between two products, norm
and gate, is worked out in the same pass. Against cuBLAS with kernels of their own between: 0.97 for 1.34 ms a step of one
sequence of 1.5B in bfloat16 (H200, vocabulary 32,000), of which reading the weights takes 0.62. cuBLAS reads out_proj and fc2
at 1.8 TB/s of 4.2, this at 2.9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from mamba3.ops.triton.again import launcher
from mamba3.ops.triton.decode_token import sigmoid
from mamba3.ops.triton.launch import cdiv, device_limits, power_of_2

# With more rows the products take longer than cuBLAS's, which has matrix instructions: fc1 of the 1.5B takes 11.0 us for two
# rows and 14.4 for four, cuBLAS 10.6 for either.
MOST_ROWS = 2
WIDEST = 8192  # channels of a row, which a program holds
TILE, NORMED_TILE = 2**15, 2**14  # elements of W that a program holds


@triton.jit
def few_rows_kernel(
    u, add, norm_weight, total, weight, y, O, eps, K: tl.constexpr, KP: tl.constexpr, M: tl.constexpr, BO: tl.constexpr,
    NORM: tl.constexpr, HAS_ADD: tl.constexpr, GATED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program BO outputs. u, add, total [m, k]; weight [o, k], or [2 o, k] where GATED; y [m, o]. AHEAD: see above."""
    o_o, o_k = tl.program_id(0) * BO + tl.arange(0, BO), tl.arange(0, KP)
    m_o, m_k = o_o < O, o_k < K
    p_W = weight + o_o[:, None].to(tl.int64) * K + o_k[None, :]
    b_W = tl.load(p_W, mask=m_o[:, None] & m_k[None, :], other=0.0)
    if GATED:
        b_G = tl.load(p_W + O.to(tl.int64) * K, mask=m_o[:, None] & m_k[None, :], other=0.0)
    if NORM:
        b_scale = tl.load(norm_weight + o_k, mask=m_k, other=0.0).to(tl.float32)
    if AHEAD:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    dtype: tl.constexpr = y.dtype.element_ty
    for i_m in tl.static_range(M):
        b_u = tl.load(u + i_m * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        if HAS_ADD:
            b_u += tl.load(add + i_m * K + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_kept = b_u.to(total.dtype.element_ty)  # what is normalised is what is kept
            if tl.program_id(0) == 0:
                tl.store(total + i_m * K + o_k, b_kept, mask=m_k)
            b_u = b_kept.to(tl.float32)
        if NORM:
            b_u *= tl.rsqrt(tl.sum(b_u * b_u) / K + eps) * b_scale
            b_u = b_u.to(weight.dtype.element_ty).to(tl.float32)
        b_y = tl.sum(b_W.to(tl.float32) * b_u[None, :], axis=1)
        if GATED:
            b_gate = tl.sum(b_G.to(tl.float32) * b_u[None, :], axis=1).to(dtype).to(tl.float32)
            b_y = b_y.to(dtype).to(tl.float32) * b_gate * sigmoid(b_gate)
        tl.store(y + i_m * O + o_o, b_y.to(dtype), mask=m_o)


def product(u: Tensor, weight: Tensor) -> Tensor:
    """u W^T of u [..., k], at most MOST_ROWS rows, and weight [o, k], in their dtype."""
    y = torch.empty(*u.shape[:-1], weight.shape[0], device=u.device, dtype=u.dtype)
    _launch(u.contiguous(), None, None, None, weight, y, 0.0, gated=False)
    return y


def normed_product(
    h: Tensor, add: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, *, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm(h + add) W^T in the dtype of weight, h + add in the dtype of h) of h, add [..., k]; h itself where there is no add.

    gated: weight is [value; gate], and value * silu(gate) comes back.
    """
    h = h.contiguous()
    outputs = weight.shape[0] // (2 if gated else 1)
    y = torch.empty(*h.shape[:-1], outputs, device=h.device, dtype=weight.dtype)
    total = h if add is None else torch.empty_like(h)
    _launch(h, None if add is None else add.contiguous(), norm_weight, total, weight, y, eps, gated=gated)
    return y, total


def _launch(u, add, norm_weight, total, weight, y, eps, *, gated):
    limits = device_limits(u.device)
    (K, O), KP = (weight.shape[1], y.shape[-1]), power_of_2(weight.shape[1])
    BO = max(1, (TILE if norm_weight is None else NORMED_TILE) // KP // (2 if gated else 1))
    while BO > 1 and cdiv(O, BO) < limits.multiprocessors:
        BO //= 2
    ahead = limits.capability[0] >= 9
    launcher(few_rows_kernel, (cdiv(O, BO),))(
        u, add, norm_weight, total, weight, y, O, eps, K=K, KP=KP, M=u.numel() // K, BO=BO, NORM=norm_weight is not None,
        HAS_ADD=add is not None, GATED=gated, AHEAD=ahead, num_warps=4, **({"launch_pdl": True} if ahead else {}),
    )  # fmt: skip
