# type: ignore  arguments are gathered in lists, whose lengths pyright does not see
"""What the launches of one backward pass share: arguments as kernels take them, the plan, and what the windows fill."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.ops.triton.forward import TRITON_TYPES, Angles, Coefficients, Sizes, angles, coefficients, rows
from mamba3.ops.triton.launch import BackwardLaunch, Device, Scratch, choose_backward, segment_programs
from mamba3.ops.triton.windows import Plan, plan
from mamba3.ops.types import Gate, Inputs, State


class Call(NamedTuple):
    """What every launch of one backward pass shares. Inputs are contiguous but x and z, parameters float32."""

    inp: Inputs
    gate: Gate
    dy: Tensor
    sizes: Sizes
    plan: Plan
    launch: BackwardLaunch
    x_row: int
    z_row: int
    c: Coefficients
    angles: Angles
    tick: Tensor
    constants: dict
    programs: int


class Rows(NamedTuple):
    """What `gradient_dt` wants, in float32: rows [h, t], and kept [c, h] of each chunk."""

    row: Tensor
    column: Tensor
    state: Tensor
    gamma: Tensor
    kept: Tensor
    tick: Tensor


class Buffers(NamedTuple):
    """Results that the windows fill; the parameters' gradients are sums that they add to. turning [c, h, a]."""

    dx: Tensor
    dz: Tensor | None
    dB: Tensor
    dC: Tensor
    dtheta: Tensor
    rows: Rows
    turning: Tensor
    parameters: dict[str, Tensor]


def prepare(
    inp: Inputs,
    gate: Gate,
    state: State | None,
    boundaries: tuple[int, ...],
    dy: Tensor,
    limits: Device,
    scratch: Scratch,
) -> Call:
    """Arguments as `backward.backward` takes them."""
    H, P = inp.x.shape[2:]
    sizes = Sizes(H, inp.B.shape[-2], inp.rank, P, inp.B.shape[-1], inp.theta.shape[-1])
    exact = inp.x.dtype == torch.float32
    launch = choose_backward(limits, inp.x.dtype, sizes.R)
    tokens = launch.tokens
    T, chunk_bytes = inp.x.shape[0] * inp.x.shape[1], H * P * sizes.N * inp.x.element_size()
    whole = T * chunk_bytes <= scratch.whole * tokens
    most = max(1, (scratch.whole if whole else scratch.part) // chunk_bytes)
    piece = max(1, scratch.piece // (2 - whole) // (H * tokens * sizes.R * sizes.N * inp.x.element_size()))
    table = plan(boundaries, tokens, segment_programs(limits, H), most, piece, inp.x.device)
    x, x_row = rows(inp.x)
    z, z_row = rows(gate.z) if gate.z is not None else (None, 0)
    c = coefficients(inp, table.tables, tokens, backward=True)
    turned = angles(inp, sizes, table.tables, tokens, None if state is None else state.phi.contiguous())

    def flat(*values: Tensor | None, parameter: bool = False) -> list[Tensor | None]:
        return [v if v is None else (v.float() if parameter else v).contiguous() for v in values]

    inp = Inputs(
        x, *flat(inp.dt, inp.A, inp.lam, inp.theta, inp.B, inp.C),
        *flat(inp.B_bias, inp.C_bias, inp.mimo_x, inp.D, parameter=True), inp.tick,
    )  # fmt: skip
    gate = Gate(z, *flat(gate.mimo_z, gate.mimo_o, parameter=True))
    constants = dict(
        **sizes.channels(), L=tokens, BULK=False, EXACT=exact, HARDWARE=limits.nvidia and not exact,
        DTYPE=TRITON_TYPES[inp.x.dtype], HAS_MIMO_X=inp.mimo_x is not None, HAS_MIMO_Z=gate.mimo_z is not None,
        HAS_MIMO_O=gate.mimo_o is not None, HAS_Z=z is not None,
    )  # fmt: skip
    tick = (inp.dt if inp.tick is None else inp.tick).contiguous()
    return Call(
        inp, gate, dy.contiguous(), sizes, table, launch, x_row, z_row, c, turned, tick, constants,
        2 * limits.multiprocessors,
    )  # fmt: skip
