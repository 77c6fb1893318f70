"""Whether the kernels of `mamba3.ops.triton.block` take what a block does beside its matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba3.ops.triton import why_not
from mamba3.ops.types import transformed

# A row of a norm is held by one program: more channels would not fit in its registers.
WIDEST = 16384


def fused_rows(*tensors: Tensor | None) -> bool:
    """On a GPU that the kernels run on, with no gradient recorded, outside torch.compile, which fuses by itself, and
    torch.func. Tensors that are None do not matter."""
    given = [v for v in tensors if v is not None]
    if given[0].device.type != "cuda" or torch.compiler.is_compiling() or any(transformed(v) for v in given):
        return False
    if torch.is_grad_enabled() and any(v.requires_grad for v in given):
        return False
    return all(why_not(v.device, v.dtype) is None for v in given)
