"""Whether the kernels of `mamba3.ops.triton.block` and `few_rows` take what a block does."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba3.ops.triton import INSTALLED, why_not
from mamba3.ops.types import transformed

# A row of a norm is held by one program: more channels would not fit in its registers.
WIDEST = 16384


def fused_rows(*tensors: Tensor | None) -> bool:
    """On a GPU that the kernels run on, with no gradient recorded, outside torch.compile, which fuses by itself, and
    torch.func. Tensors that are None do not matter."""
    given = [v for v in tensors if v is not None]
    if given[0].device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(v.requires_grad for v in given):
        return False
    return all(not transformed(v) and why_not(v.device, v.dtype) is None for v in given)


def fused_products(u: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether `few_rows` takes the product of u [..., k], or of what is made of it, with weight [o, k]: 16 bits, few rows."""
    if u.device.type != "cuda" or not INSTALLED or torch.compiler.is_compiling() or weight.element_size() != 2:
        return False
    from mamba3.ops.triton.few_rows import MOST_ROWS, WIDEST

    # Sizes first: most products have more rows, and this is asked of every one.
    k = weight.shape[1]
    if u.numel() > MOST_ROWS * k or u.shape[-1] != k or k > WIDEST or not weight.is_contiguous():
        return False
    return not torch.is_autocast_enabled("cuda") and fused_rows(u, weight, *others)
