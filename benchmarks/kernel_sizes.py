"""The layer of the 1.5B model: its shapes, inputs as it makes them, and the floors of its recurrence.

A floor is the least that must be moved or multiplied, at the rates the device reached in the same run.
"""

from __future__ import annotations

from typing import Any

import torch

HEADS, HEADDIM, STATE, PAIRS = 64, 64, 128, 32
D_MODEL = 2048
# (batch, tokens) by rank
SHAPES = {
    1: [(8, 2048), (32, 2048), (1, 16384), (1, 131072), (128, 512)],
    4: [(8, 2048), (1, 16384), (1, 131072), (128, 512)],
}
DECODE = (1, 8, 32, 128, 512)


def inputs(b: int, t: int, r: int, dtype: torch.dtype, h=HEADS, p=HEADDIM, n=STATE, a=PAIRS) -> dict[str, Any]:
    """Arguments of `scan` as a layer makes them: dt log-uniform in [1e-3, 1e-1], biases about 1."""
    new: dict[str, Any] = {"device": "cuda", "dtype": torch.float32}

    def normal(*shape):
        return torch.randn(*shape, **new)

    values = dict(
        x_bthp=normal(b, t, h, p).to(dtype), dt_bth=1e-3 * 100 ** torch.rand(b, t, h, **new),
        A_bth=-(0.5 + 4 * torch.rand(b, t, h, **new)), lam_bth=torch.rand(b, t, h, **new),
        theta_bta=3.14 * normal(b, t, a).tanh(), B_btrgn=normal(b, t, r, 1, n).to(dtype),
        C_btrgn=normal(b, t, r, 1, n).to(dtype), B_bias_hrn=1 + 0.3 * normal(h, r, n), C_bias_hrn=1 + 0.3 * normal(h, r, n),
        D_h=normal(h), z_bthp=normal(b, t, h, p).to(dtype),
    )  # fmt: skip
    if r > 1:
        values |= {name: 1 / r + 0.3 * normal(h, r, p) for name in ("mimo_x_hrp", "mimo_z_hrp", "mimo_o_hrp")}
    return values


def moved_bytes(b: int, t: int, r: int, backward: bool) -> int:
    """Each tensor once a pass. Forward: x, z, y, B, C, dt, A, lam, theta and the final state; with the backward pass x, z, dy,
    dx, dz, B, C, their gradients and those of the coefficients as well."""
    wide, shared, rows = HEADS * HEADDIM * 2, r * STATE * 2, HEADS * 4
    token = 3 * wide + 2 * shared + 3 * rows + PAIRS * 4
    if backward:
        token += 5 * wide + 4 * shared + 6 * rows + 2 * PAIRS * 4
    return b * t * token + b * HEADS * HEADDIM * STATE * 4


def products_flops(b: int, t: int, r: int, backward: bool) -> int:
    """Scores, values, read-out and state of chunks of 64 rows: 4 products of 64 rows a token and rank; each has two
    gradients, which are products of the same size."""
    forward = b * t * r * HEADS * 2 * (64 * STATE + 64 * HEADDIM + 2 * HEADDIM * STATE)
    return forward * 3 if backward else forward


def floors(b: int, t: int, r: int, backward: bool, top: dict[str, float]) -> dict[str, float]:
    """Milliseconds by the measured `ceilings`."""
    return {
        "bytes_ms": moved_bytes(b, t, r, backward) / top["copy_TBs"] / 1e9,
        "products_ms": products_flops(b, t, r, backward) / top["matmul_TFLOPs"] / 1e9,
    }
