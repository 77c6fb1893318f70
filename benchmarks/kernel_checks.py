"""What must hold of the kernels before they are timed: errors against float64 beside the chunked path's in the same dtype.

The kernels may have twice that path's error, and must give the same bits again. Parameters' gradients, which are few numbers
or sums over all tokens, are judged together, by the root of their mean square (tests/ops/test_triton_backward.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import distance
from benchmarks.kernel_sizes import inputs
from mamba3 import ops

FLOOR = 3e-7
PARAMETERS = ("B_bias_hrn", "C_bias_hrn", "mimo_x_hrp", "mimo_z_hrp", "mimo_o_hrp", "D_h")
# rank, batch, tokens, heads, P, N, pairs
FORWARD = (
    (1, 2, 65, 3, 24, 20, 5),
    (1, 1, 4097, 2, 64, 128, 32),
    (3, 1, 64, 3, 24, 20, 5),
    (4, 1, 300, 2, 64, 128, 32),
)
BACKWARD = ((1, 1, 193, 2, 64, 128, 32), (4, 1, 300, 4, 64, 128, 32))
SMALL = ((1, 2, 65, 3, 24, 20, 5), (3, 1, 64, 3, 24, 20, 5))
# float32 gradients on the small shapes alone: at N 128 they take minutes to compile
CASES = {
    "bfloat16": {"forward": FORWARD, "backward": (*SMALL, *BACKWARD)},
    "float16": {"forward": SMALL, "backward": SMALL},
    "float32": {"forward": SMALL, "backward": SMALL},
}


def gradients(values: dict[str, Any], dy: Tensor, impl: Any) -> dict[str, Tensor]:
    """Of every argument of `scan`, from that of y."""
    exact = impl == "reference"
    leaves: dict[str, Any] = {
        name: (v.double() if exact else v.detach().clone()).requires_grad_() for name, v in values.items()
    }
    y = ops.scan(**leaves, impl=impl).y
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)), strict=True))


def results(values: dict[str, Any], dy: Tensor, impl: Any, backward: bool) -> dict[str, Tensor]:
    """What is compared: y and S, or the gradients."""
    if backward:
        return gradients(values, dy, impl)
    with torch.no_grad():
        out = ops.scan(**values, impl=impl)
    return {"y": out.y, "S": out.state.S}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by name; those of the parameters' gradients together."""
    each = {name: distance(found[name], true) for name, true in truth.items()}
    together = [each.pop(name) ** 2 for name in PARAMETERS if name in each]
    return each | ({"parameters": (sum(together) / len(together)) ** 0.5} if together else {})


def check(dtype: str, backward: bool, case: tuple[int, ...]) -> dict[str, Any]:
    """One row of the results; `ok` says whether the laws hold."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  what nobody wrote is NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    r, b, t, h, p, n, a = case
    values = inputs(b, t, r, getattr(torch, dtype), h, p, n, a)
    dy = torch.randn_like(values["x_bthp"])
    truth, yardstick, ours, again = (
        results(values, dy, impl, backward) for impl in ("reference", "chunked", "triton", "triton")
    )
    mine, theirs = errors(ours, truth), errors(yardstick, truth)
    bitwise = all(torch.equal(ours[name], again[name]) for name in ours)
    return {
        "dtype": dtype, "pass": "backward" if backward else "forward", "rank": r, "batch": b, "tokens": t, "heads": h,
        "P": p, "N": n, "pairs": a, "errors": {name: [e, theirs[name]] for name, e in mine.items()}, "bitwise": bitwise,
        "ok": bitwise and all(e <= 2 * theirs[name] + FLOOR for name, e in mine.items()),
    }  # fmt: skip
