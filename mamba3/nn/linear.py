"""Linear layers where less than the whole product is wanted, or one row of it.

Each function equals `linear(u)` or a part of it. What is not a plain nn.Linear with plain weights (an adapter around it, a
quantised weight, a hook, a replaced forward) is called as it is, so that nothing which someone put there is passed by.
"""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.nn.fused import fused_products

MOST_ROWS = 5  # on a CPU: beyond, F.linear has about caught up
LARGE = 2**25  # bytes: more than the caches near a core hold


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the layer is its weight and bias and nothing else."""
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and is_untouched(linear)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module is its class's forward and nothing else: no hook, no forward of its own, not compiled."""
    changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not changed and module._compiled_call_impl is None


@functools.cache
def _linear_is_best() -> bool:
    """Whether F.linear is the best product for one row of bfloat16 too: with AVX512-BF16 and no AMX.

    With torch 2.13, on an AMD EPYC (which has the one and not the other) it takes 0.3 to 0.8 of mv's time; on an Intel Xeon it
    reads a matrix at 17 GB/s for mv's 26 (18 and 40 for a head of 32,000).
    """
    known = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return None not in known and [ask() for ask in known if ask] == [True, False]


def _one_row(matrix: Tensor, vector: Tensor) -> Tensor:
    return F.linear(vector[None], matrix)[0] if _linear_is_best() else torch.mv(matrix, vector)


@torch.library.custom_op("mamba3::matrix_vector", mutates_args=())
def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product as one node: torch.compile would write its own loop, which takes 3 times as long (torch 2.13, x86)."""
    return _one_row(matrix, vector)


@matrix_vector.register_fake
def _(matrix: Tensor, vector: Tensor) -> Tensor:
    return vector.new_empty(matrix.shape[0])


def few_rows(u: Tensor, weight: Tensor) -> Tensor | None:
    """F.linear(u, weight) by what is faster for a few rows: on a GPU the kernel `few_rows`, on a CPU one row of bfloat16 by
    `matrix_vector`, and weight @ u^T for 2 to 5 rows of float32 with a weight of `LARGE` bytes. None elsewhere, and where
    a gradient is recorded.

    With torch 2.13 on x86, float16 is three times slower in mv. For 2 to 5 rows of float32 and a head of 32,000 x 768, F.linear
    takes 1.9 to 3.8 times as long as the product from the other side (an AMD EPYC, one and two threads); weights
    that a cache holds are read as fast either way, or in 0.7 of the time by F.linear.
    """
    if type(weight) is not nn.Parameter:
        return None
    if u.dtype == weight.dtype and fused_products(u, weight):
        from mamba3.ops.triton.few_rows import product

        return product(u, weight)
    outputs, k = weight.shape
    rows, compiles = u.numel() // k, torch.compiler.is_compiling()
    if u.device.type != "cpu" or u.dtype != weight.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if rows == 1 and u.dtype == torch.bfloat16:
        multiply = matrix_vector if compiles else _one_row
        return multiply(weight, u.reshape(-1)).view(*u.shape[:-1], outputs)
    if 2 <= rows <= MOST_ROWS and u.dtype == torch.float32 and weight.nbytes >= LARGE and not compiles:
        return torch.mm(weight, u.reshape(rows, k).t()).t().contiguous().view(*u.shape[:-1], outputs)
    return None


def project(linear: nn.Module, u: Tensor) -> Tensor:
    """linear(u), by `few_rows` where the layer is plain."""
    y = few_rows(u, linear.weight) if is_plain(linear) and linear.bias is None else None
    return linear(u) if y is None else y


def spare_columns(u: Tensor, linear: nn.Module) -> int:
    """How many columns of zeros `project_aligned` adds: as many as bring a row to whole 16 bytes, where that pays.

    That is on CUDA in 16 bits while a gradient is recorded: there cuBLAS takes kernels of an older generation for the product
    and both of its gradients where a row is no multiple of 16 bytes (torch 2.11 on an H200: 14 of 75 ms of a step).
    """
    if u.device.type != "cuda" or not torch.is_grad_enabled() or not is_plain(linear) or linear.bias is not None:
        return 0
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else linear.weight.dtype
    return -linear.out_features % 8 if dtype.itemsize == 2 else 0


def project_aligned(linear: nn.Module, u: Tensor) -> Tensor:
    """linear(u) [..., outputs], or behind it as many columns of zeros as `spare_columns` says.

    The weight gets rows of zeros for this one product; the parameter keeps its shape, and the gradient is of its own rows. Who
    splits all the columns, the zeros too, has a gradient of the same aligned rows.
    """
    spare = spare_columns(u, linear)
    if not spare or not is_plain(linear):
        return project(linear, u)
    weight: Tensor = linear.weight
    if torch.is_autocast_enabled(u.device.type):  # rounded before it is copied, which is then half as much
        weight = weight.to(torch.get_autocast_dtype(u.device.type))
    return F.linear(u, F.pad(weight, (0, 0, 0, spare)))


def outputs_from(linear: nn.Module, u: Tensor, first: int) -> Tensor:
    """linear(u)[..., first:], without computing the others where the layer is plain."""
    if not is_plain(linear):
        return linear(u)[..., first:]
    return F.linear(u, linear.weight[first:], None if linear.bias is None else linear.bias[first:])
