"""The forward pass as a torch.library op: torch.compile and CUDA graphs see one node. It records no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mamba3.ops.triton import forward
from mamba3.ops.types import Gate, Inputs, ScanOutput, State


@torch.library.custom_op("mamba3::scan", mutates_args=())
def scan_op(
    x: Tensor, dt: Tensor, A: Tensor, lam: Tensor, theta: Tensor, B: Tensor, C: Tensor, B_bias: Tensor | None,
    C_bias: Tensor | None, mimo_x: Tensor | None, D: Tensor | None, tick: Tensor | None, z: Tensor | None,
    mimo_z: Tensor | None, mimo_o: Tensor | None, norm: str, norm_weight: Tensor | None, phi: Tensor | None,
    S: Tensor | None, B_prev: Tensor | None, x_prev: Tensor | None, cu_seqlens: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`mamba3.ops.scan` after validation: y and the state's phi, S, B_prev, x_prev."""
    inp = Inputs(x, dt, A, lam, theta, B, C, B_bias, C_bias, mimo_x, D, tick)
    state = None
    if phi is not None and S is not None and B_prev is not None and x_prev is not None:
        state = State(phi, S, B_prev, x_prev)
    boundaries = None if cu_seqlens is None else list(cu_seqlens)
    y, after = forward.scan(inp, Gate(z, mimo_z, mimo_o, norm, norm_weight), state, boundaries)
    return y, *after[:4]


@scan_op.register_fake
def _(
    x, dt, A, lam, theta, B, C, B_bias, C_bias, mimo_x, D, tick, z, mimo_z, mimo_o, norm, norm_weight, phi, S, B_prev,
    x_prev, cu_seqlens,
):  # fmt: skip
    b, t, h, p = x.shape
    r, n = B.shape[-3], B.shape[-1]
    s = b if cu_seqlens is None else len(cu_seqlens) - 1
    y = x.new_empty((b, t, r, h, p) if z is None else (b, t, h, p))
    wide = {"dtype": torch.float32}
    return (
        y, x.new_empty((s, h, theta.shape[-1]), **wide), x.new_empty((s, h, p, n), **wide),
        x.new_empty((s, r, h, n)), x.new_empty((s, h, p)),
    )  # fmt: skip


def scan(inp: Inputs, gate: Gate, state: State | None, cu_seqlens: list[int] | None) -> ScanOutput:
    """The arguments of an implementation; state None is the zero state, which then costs nothing.

    Outside torch.compile the kernels are launched without the op around them, which would take longer than they do.
    """
    if not torch.compiler.is_compiling():
        return forward.scan(inp, gate, state, cu_seqlens)
    fields = (None,) * 4 if state is None else state[:4]
    y, *after = scan_op(*inp, *gate, *fields, cu_seqlens)
    return ScanOutput(y, State(*after, conv=None if state is None else state.conv))
