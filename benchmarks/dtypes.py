"""Errors by dtype: y, the state and every gradient of the chunked recurrence against the definition in float64.

The definition gets the same numbers, already rounded to the dtype, so that what is measured is the computation and not the
rounding of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import angle_distance, distance
from benchmarks.loop import double, recurrence_inputs
from benchmarks.results import Tell
from mamba3 import Mamba3
from mamba3.ops.scan import run_scan
from mamba3.ops.types import Gate, Inputs

ROUNDED = ("x", "B", "C", "z")  # what a layer of that dtype hands over in it; coefficients and parameters stay float32


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Four heads of the published sizes."""

    tokens: int = 512
    d_state: int = 128
    headdim: int = 64
    heads: int = 4
    ranks: tuple[int, ...] = (1, 4)
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def measure(sizes: Sizes, tell: Tell) -> list[dict[str, Any]]:
    """A row for each rank and dtype: unit roundoff, and the relative error of y, phi (radians), S, and each gradient."""
    rows = []
    for rank in sizes.ranks:
        for dtype in sizes.dtypes:
            name = str(dtype).removeprefix("torch.")
            tell(f"rank {rank}, {name}")
            inp, gate = _inputs(sizes, rank, dtype)
            y, phi, S, gradients = _run(inp, gate, "chunked")
            true_y, true_phi, true_S, true_gradients = _run(double(inp), double(gate), "reference")
            rows.append(
                {
                    "rank": rank,
                    "dtype": name,
                    "tokens": sizes.tokens,
                    "unit_roundoff": torch.finfo(dtype).eps / 2,
                    "y": distance(y, true_y),
                    "phi_rad": angle_distance(phi, true_phi),
                    "S": distance(S, true_S),
                    "gradients": {f: distance(g, true_gradients[f]) for f, g in gradients.items()},
                }
            )
    return rows


def _inputs(sizes: Sizes, rank: int, dtype: torch.dtype) -> tuple[Inputs, Gate]:
    torch.manual_seed(0)
    d_model = sizes.heads * sizes.headdim // 2
    layer = Mamba3(d_model, sizes.d_state, headdim=sizes.headdim, mimo_rank=rank, dtype=torch.float64)
    inp, gate = recurrence_inputs(layer, torch.randn(1, sizes.tokens, d_model, dtype=torch.float64))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rounded(values):
        return values._replace(
            **{f: v.detach().to(dtype if f in ROUNDED else wide) for f, v in _tensors(values).items()}
        )

    return rounded(inp), rounded(gate)


def _tensors(*groups: Any) -> dict[str, Tensor]:
    fields = {f: getattr(values, f) for values in groups for f in values._fields}
    return {f: v for f, v in fields.items() if isinstance(v, Tensor)}


def _run(inp: Inputs, gate: Gate, impl: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """y, phi, S and the gradients of a fixed random functional of y and S."""
    leaves = {f: v.requires_grad_() for f, v in _tensors(inp, gate).items()}
    y, state = run_scan(inp, gate, impl=impl)
    generator = torch.Generator().manual_seed(2)
    on_y, on_S = (torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in (y, state.S))
    loss = (y.double() * on_y).sum() + (state.S.double() * on_S).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return y, state.phi, state.S, dict(zip(leaves, gradients, strict=True))
