"""RMSNorm that computes in at least float32 and answers in the dtype of its weight or input."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.nn.fused import WIDEST, fused_products, fused_rows
from mamba3.nn.linear import is_plain, project
from mamba3.ops.types import wide_dtype

# From here on a CPU is quicker with fewer passes than F.rms_norm makes (torch 2.13): 0.5 ms for 2,048 x 768 against 1.8.
LARGE = 2**16


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; computed in float32 (float64 for float64), returned in `x.dtype` or `dtype`."""

    def __init__(self, size: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        wide = wide_dtype(x.dtype)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() >= LARGE:
            size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
            y = x * (size.square() / x.shape[-1] + self.eps).rsqrt()
            y = y * self.weight.to(wide) if torch.is_grad_enabled() else y.mul_(self.weight.to(wide))
        else:
            y = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)
        return y.to(dtype or x.dtype)

    def after(self, h: Tensor, y: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(norm(h + y) in `dtype`, h + y) of a residual stream and what is added to it, None for nothing.

        One pass over both on a GPU, where no gradient is recorded; on it the result differs by rounding alone.
        """
        if fused_rows(h, y, self.weight) and h.shape[-1] <= WIDEST:
            from mamba3.ops.triton.block import add_norm

            return add_norm(h, y, self.weight, self.eps, dtype)
        h = h if y is None else h + y
        return self(h, dtype), h

    def project(
        self, h: Tensor, y: Tensor | None, dtype: torch.dtype, linear: nn.Module, *, gated: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(linear(norm(h + y) in `dtype`), h + y): for a row or two on a GPU one kernel, elsewhere `after` and the layer.

        gated: of the layer's outputs [value | gate], value * silu(gate), which only that kernel gives; see `projects`.
        """
        if self.projects(h, y, dtype, linear):
            from mamba3.ops.triton.few_rows import normed_product

            weight = cast("Tensor", linear.weight)
            return normed_product(h, y, self.weight, self.eps, weight, gated=gated)
        assert not gated
        u, h = self.after(h, y, dtype)
        return project(linear, u), h

    def projects(self, h: Tensor, y: Tensor | None, dtype: torch.dtype, linear: nn.Module) -> bool:
        """Whether `project` is one kernel."""
        if not is_plain(linear) or linear.bias is not None or linear.weight.dtype != dtype:
            return False
        return fused_products(h, linear.weight, y, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
