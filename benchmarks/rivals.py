"""Kernels of other projects at the sizes of `kernels`, where they can be imported; called as their authors call them.

Their results are timed and not checked: random inputs in the ranges their models feed them. Each tunes itself, as released,
before it is timed. One that cannot be built or run here is left out, and the results say why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, HEADDIM, STATE, PAIRS = 64, 64, 128, 32
Run = Callable[[], object]


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, device="cuda")


def sdpa(b: int, t: int) -> Run:
    """Causal attention of 32 heads of 64 in PyTorch, with the same inner width per token as half our heads."""
    q, k, v = (_normal(b, 32, t, 64) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def mamba2(b: int, t: int) -> Run:
    """Mamba-2's scan at its own chunk size of 256."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    x, z, B, C = (_normal(b, t, *s) for s in ((HEADS, HEADDIM), (HEADS, HEADDIM), (1, STATE), (1, STATE)))
    dt, A, D = 0.1 * _uniform(b, t, HEADS), -1 - _uniform(HEADS), _uniform(HEADS)
    return lambda: mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, z=z)


def official_siso(b: int, t: int) -> Run:
    """The official Mamba-3 of one rank, in Triton."""
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined  # type: ignore[import-not-found]

    B, C, x, z = (_normal(b, t, *s) for s in ((1, STATE), (1, STATE), (HEADS, HEADDIM), (HEADS, HEADDIM)))
    dt, lam = 0.1 * _uniform(b, HEADS, t), _uniform(b, HEADS, t)
    angles, bias, D = _normal(b, t, HEADS, PAIRS), _uniform(HEADS, STATE), _uniform(HEADS)
    return lambda: mamba3_siso_combined(C, B, x, -dt, dt, lam, bias, bias, angles, D, z)


def official_mimo(b: int, t: int) -> Run:
    """The official Mamba-3 of four ranks, in TileLang."""
    from mamba_ssm.ops.tilelang.mamba3.mamba3_mimo import mamba3_mimo  # type: ignore[import-not-found]

    B, C, x, z = (_normal(b, t, *s) for s in ((4, 1, STATE), (4, 1, STATE), (HEADS, HEADDIM), (HEADS, HEADDIM)))
    dt, lam = 0.1 * _uniform(b, HEADS, t), _normal(b, HEADS, t, dtype=torch.float32)
    angles, bias, mimo, D = (
        _normal(b, t, HEADS, PAIRS),
        _uniform(HEADS, 4, STATE),
        _uniform(HEADS, 4, HEADDIM),
        _uniform(HEADS),
    )
    return lambda: mamba3_mimo(C, B, x, -dt, dt, lam, bias, bias, mimo, mimo, mimo, angles, D, z, 16, 4, torch.bfloat16)


def gated_delta_rule(b: int, t: int) -> Run:
    """flash-linear-attention's gated delta rule with 32 heads of 128 by 128: the same inner width."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    q, k, v = (F.normalize(_normal(b, t, 32, 128), dim=-1) for _ in range(3))
    g, beta = -0.1 * _uniform(b, t, 32), _uniform(b, t, 32).bfloat16()
    return lambda: chunk_gated_delta_rule(q, k, v, g=g, beta=beta)


class Rival(NamedTuple):
    """Ranks it stands beside, and the longest sequence it is asked for."""

    name: str
    build: Callable[[int, int], Run]
    rank: int
    longest: int


RIVALS = (
    Rival("sdpa, 32 heads of 64", sdpa, 1, 16384),
    Rival("Mamba-2", mamba2, 1, 131072),
    Rival("gated delta rule", gated_delta_rule, 1, 131072),
    Rival("official SISO", official_siso, 1, 131072),
    Rival("official MIMO", official_mimo, 4, 16384),
)


def _failures() -> tuple[type[Exception], ...]:
    """What other projects' kernels raise where they do not fit the machine: a result, which must not end ours."""
    from triton.errors import TritonError  # Triton is only where there is a GPU for it

    known = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError)
    return (*known, TritonError)


def rivals(rank: int, b: int, t: int) -> tuple[dict[str, Run], dict[str, str]]:
    """Those that run here, warm, and why the others do not."""
    runs, left_out, failures = {}, {}, _failures()
    for rival in RIVALS:
        if rival.rank != rank:
            continue
        if t > rival.longest:
            left_out[rival.name] = f"asked for {rival.longest} tokens at most"
            continue
        try:
            run = rival.build(b, t)
            run()
            torch.cuda.synchronize()
            runs[rival.name] = run
        except failures as error:
            left_out[rival.name] = f"{type(error).__name__}: {str(error)[:200]}"
    return runs, left_out
