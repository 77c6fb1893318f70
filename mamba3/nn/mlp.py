"""The gated MLP of the language model: fc1 -> (value, gate), fc2(value * silu(gate))."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.nn.fused import fused_rows
from mamba3.nn.linear import is_untouched, project
from mamba3.nn.norm import RMSNorm

MULTIPLE = 128


class GatedMLP(nn.Module):
    """SwiGLU without biases; the inner size is rounded up to a multiple of 128. [..., d] to [..., d]."""

    def __init__(self, d_model: int, d_intermediate: int, device=None, dtype=None):
        super().__init__()
        inner = -(-d_intermediate // MULTIPLE) * MULTIPLE
        self.fc1 = nn.Linear(d_model, 2 * inner, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(inner, d_model, bias=False, device=device, dtype=dtype)

    def after(self, norm: RMSNorm, h: Tensor, y: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(mlp(norm(h + y) in `dtype`), h + y); for a row or two on a GPU norm, fc1 and the gate are one kernel."""
        if norm.projects(h, y, dtype, self.fc1) and is_untouched(self):
            inner, h = norm.project(h, y, dtype, self.fc1, gated=True)
            return project(self.fc2, inner), h
        u, h = norm.after(h, y, dtype)
        return self(u), h

    def forward(self, u: Tensor) -> Tensor:
        inner = project(self.fc1, u)
        if fused_rows(inner):
            from mamba3.ops.triton.block import swiglu

            return project(self.fc2, swiglu(inner))
        value, gate = inner.chunk(2, dim=-1)
        return project(self.fc2, value * F.silu(gate))
