# type: ignore  the arguments of a launch are constants of the kernel, which pyright takes for wrong types
"""The forward pass: coefficients, turns and phases, (segments' summaries, merge,) fused output, the last token."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mamba3.ops.gate import apply_gate
from mamba3.ops.triton.ahead import at
from mamba3.ops.triton.assembler import sound_assembler
from mamba3.ops.triton.coefficients import coefficients_kernel
from mamba3.ops.triton.last_token import last_token_kernel
from mamba3.ops.triton.launch import (
    Device,
    Launch,
    cdiv,
    choose,
    device_limits,
    padded,
    piece,
    power_of_2,
    segment_programs,
    side_by_side,
)
from mamba3.ops.triton.output import output_kernel
from mamba3.ops.triton.segments import merge_kernel, summary_kernel
from mamba3.ops.triton.tables import Tables, closed_tables, tables
from mamba3.ops.triton.turns import phases_kernel, turns_kernel
from mamba3.ops.types import Gate, Inputs, ScanOutput, State

TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Sizes(NamedTuple):
    """Of one call: the letters of mamba3.ops, padded where a P follows, and what is present."""

    H: int
    G: int
    R: int
    P: int
    N: int
    A: int

    @property
    def RP(self) -> int:
        return power_of_2(self.R)

    @property
    def W(self) -> int:
        return piece(self.N, self.A)

    @property
    def NQ(self) -> int:
        return self.W * (4 if 0 < 2 * self.A < self.N else 2)

    @functools.cache  # noqa: B019, values of a few models
    def channels(self) -> dict[str, int]:
        """Constants of the forward's matrix stages (`mamba3.ops.triton.channels`)."""
        return dict(
            H=self.H,
            G=self.G,
            R=self.R,
            RP=self.RP,
            P=self.P,
            PP=padded(self.P),
            N=self.N,
            A=self.A,
            W=self.W,
            NQ=self.NQ,
        )

    @functools.cache  # noqa: B019
    def matrix(self) -> dict[str, int]:
        """Constants of the kernels that multiply matrices."""
        U = self.N - 2 * self.A
        return dict(
            H=self.H, G=self.G, R=self.R, RP=self.RP, P=self.P, PP=padded(self.P), N=self.N, A=self.A,
            AP=padded(self.A), UP=padded(U),
        )  # fmt: skip


class Coefficients(NamedTuple):
    """Rows [h, t] of each token.

    What is not needed is empty: source in the backward pass, weight in the forward, *_low outside float32.
    """

    decay: Tensor
    decay_low: Tensor
    source: Tensor
    source_low: Tensor
    weight: Tensor
    gamma: Tensor


def rows(v: Tensor) -> tuple[Tensor, int]:
    """x or z [b, t, h, p] and its elements a token: columns of a wider projection are read where they are."""
    b, t, h, p = v.shape
    row = v.stride(1)
    if v.stride(3) == 1 and v.stride(2) == p and (b == 1 or v.stride(0) == t * row):
        return v, row
    return v.contiguous(), h * p


def row_stride(tokens: int) -> int:
    """Elements of a coefficient's row [h, t]: a multiple of 16, which kernels are compiled for, whatever the length."""
    return -(-tokens // 16) * 16


def _flat(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _parameter(v: Tensor | None) -> Tensor | None:
    if v is None or (v.dtype is torch.float32 and v.is_contiguous()):
        return v
    return v.float().contiguous()


def suits_bulk(inp: Inputs, gate: Gate, sizes: Sizes, boundaries: tuple[int, ...]) -> bool:
    """Whether the bulk copy engine can read the tiles: boxes without padding, rows and bases at multiples of 16 bytes.

    Boxes know no end of a sequence: all must end with a chunk, of 64 tokens at most. And there must be enough to do: the
    host takes longer over descriptors than a short scan takes.
    """
    if inp.x.shape[0] * inp.x.shape[1] * sizes.H < 2**18 or any(n % 64 for n in boundaries):
        return False
    wide = [v for v in (inp.x, gate.z) if v is not None]
    tiles_of = (padded(sizes.P), sizes.NQ, sizes.W, sizes.RP)
    unpadded = tiles_of == (sizes.P, sizes.N, sizes.A, sizes.R)
    aligned = all(v.data_ptr() % 16 == 0 for v in (*wide, inp.B, inp.C)) and all(rows(v)[1] % 8 == 0 for v in wide)
    return unpadded and aligned and sizes.N % 8 == 0


def tiles(inp: Inputs, gate: Gate, sizes: Sizes, launch: Launch, turn: Tensor) -> dict[str, Tensor | TensorDescriptor]:
    """x, z, B, C and turn as the matrix stages take them: pointers, or descriptors for the bulk copy engine."""
    T = inp.x.shape[0] * inp.x.shape[1]
    (x, x_row), (z, z_row) = rows(inp.x), rows(gate.z) if gate.z is not None else (None, 0)
    v = dict(x=x, z=z, B=inp.B.contiguous(), C=inp.C.contiguous(), turn=turn)
    if launch.bulk:
        L, width = launch.tokens, sizes.G * sizes.N
        for name in ("B", "C"):
            v[name] = TensorDescriptor(v[name], [T * sizes.R, width], [width, 1], [L * sizes.R, sizes.W])
        v["turn"] = TensorDescriptor(turn, [turn.shape[0] * turn.shape[1], sizes.A], [sizes.A, 1], [L, sizes.A])
        for name, row in (("x", x_row), ("z", z_row)):
            if v[name] is not None:
                v[name] = TensorDescriptor(v[name], [T, sizes.H * sizes.P], [row, 1], [L, sizes.P])
    return v | dict(x_row=x_row, z_row=z_row)


class Angles(NamedTuple):
    """turn [h, t, a] of each token in its chunk, phase [c, h, a] at the chunk's start, phi [s, h, a] in radians at the end."""

    turn: Tensor
    phase: Tensor
    phi: Tensor


def angles(inp: Inputs, sizes: Sizes, table: Tables, chunk: int, phi: Tensor | None) -> Angles:
    """The angles of chunks of `chunk` tokens, from phi [s, h, a] before the first token."""
    T, H, A = row_stride(inp.x.shape[0] * inp.x.shape[1]), sizes.H, sizes.A
    exact = inp.x.dtype == torch.float32
    chunks, sequences, device = table.chunks.shape[0], table.sequences.shape[0], inp.x.device
    phi_out = torch.empty(sequences, H, A, device=device, dtype=torch.float32)
    turn = torch.empty(H, T, A, device=device, dtype=torch.int32 if exact else torch.int16)
    phase = torch.empty(chunks, H, A, device=device, dtype=torch.int32)
    if A:
        HB, BLOCK = min(8, power_of_2(H)), 32
        tick = (inp.dt if inp.tick is None else inp.tick).contiguous()
        at(turns_kernel, (chunks, cdiv(H, HB)))(
            inp.theta.contiguous(), tick, table.chunks, turn, phase, T,
            H=H, A=A, AP=power_of_2(A), L=chunk, LB=8, HB=HB, EXACT=exact, num_warps=1,
        )  # fmt: skip
        at(phases_kernel, (sequences, cdiv(H * A, BLOCK)))(
            phase, phi, table.sequences, phi_out, HA=H * A, CB=64, BLOCK=BLOCK, HAS_PHI=phi is not None, num_warps=4
        )
    return Angles(turn, phase, phi_out)


def coefficients(inp: Inputs, table: Tables, chunk: int, *, backward: bool = False) -> Coefficients:
    """What every chunk of `chunk` tokens needs before its matrices."""
    T, H = row_stride(inp.x.shape[0] * inp.x.shape[1]), inp.x.shape[2]
    exact = inp.x.dtype == torch.float32
    present = (True, exact, not backward, exact and not backward, backward, True)
    parts = iter(side_by_side(sum(present), (H, T), device=inp.x.device, dtype=torch.float32))
    absent = torch.empty(0, device=inp.x.device, dtype=torch.float32)
    c = Coefficients(*(next(parts) if here else absent for here in present))
    HB = min(16, power_of_2(H))
    at(coefficients_kernel, (table.chunks.shape[0], cdiv(H, HB)))(
        inp.dt.contiguous(), inp.A.contiguous(), inp.lam.contiguous(), table.chunks, *c, T,
        H=H, L=chunk, HB=HB, EXACT=exact, BACKWARD=backward, num_warps=4,
    )  # fmt: skip
    return c


def entering_states(
    inp: Inputs,
    v: dict,
    sizes: Sizes,
    table: Tables,
    c: Coefficients,
    phase: Tensor,
    state: State | None,
    options: dict,
) -> Tensor | None:
    """The state that enters each segment [k, h, p, n], or None where all are zero."""
    if state is None and not table.split:
        return None
    H, P, N = sizes.H, sizes.P, sizes.N
    count = table.segments.shape[0]
    S = torch.empty(count, H, P, N, device=inp.x.device, dtype=torch.float32)
    total = torch.empty(count, H, device=inp.x.device, dtype=torch.float32)
    if table.split:
        at(summary_kernel, (H, count))(
            v["x"], v["B"], _parameter(inp.B_bias), _parameter(inp.mimo_x), c.decay, c.decay_low, c.source, c.source_low,
            v["turn"], phase, table.segments, S, total, c.decay.shape[1], v["x_row"], **options,
        )  # fmt: skip
    given = State(*(_flat(v) for v in state)) if state is not None else State(S, S, S, S)
    PB = min(16, power_of_2(P))
    at(merge_kernel, (H, table.sequences.shape[0], cdiv(P, PB)))(
        S, total, given.S, given.x_prev, given.B_prev, _parameter(inp.mimo_x), inp.dt.contiguous(),
        inp.lam.contiguous(), table.sequences, table.sequence_segments,
        H=H, R=sizes.R, P=P, PB=PB, N=N, NP=power_of_2(N), HAS_STATE=state is not None,
        HAS_MIMO_X=inp.mimo_x is not None, num_warps=4,
    )  # fmt: skip
    return S


def last_token(inp: Inputs, sizes: Sizes, table: Tables, phi: Tensor) -> tuple[Tensor, Tensor]:
    """B_prev [s, r, h, n] and x_prev [s, h, p] of the state after each sequence."""
    s = table.sequences.shape[0]
    B_prev = torch.empty(s, sizes.R, sizes.H, sizes.N, device=phi.device, dtype=inp.x.dtype)
    x_prev = torch.empty(s, sizes.H, sizes.P, device=phi.device, dtype=inp.x.dtype)
    x, x_row = rows(inp.x)
    constants = {name: value for name, value in sizes.matrix().items() if name != "RP"}
    at(last_token_kernel, (sizes.H, s))(
        x, inp.B.contiguous(), _parameter(inp.B_bias), phi, table.sequences, B_prev, x_prev, x_row,
        **constants, HAS_BIAS_B=inp.B_bias is not None, num_warps=1,
    )  # fmt: skip
    return B_prev, x_prev


def scan(
    inp: Inputs,
    gate: Gate,
    state: State | None,
    cu_seqlens: list[int] | None,
    *,
    launch: Launch | None = None,
    limits: Device | None = None,
    wide: bool = False,
) -> ScanOutput:
    """The recurrence over all tokens; arguments as `check_inputs` gives them, state None where it is zero.

    wide: y in float32, for a norm that follows.
    """
    with sound_assembler(inp.x.device):
        return _scan(inp, gate, state, cu_seqlens, launch, limits or device_limits(inp.x.device), wide)


def final_state(
    inp: Inputs, state: State | None, *, launch: Launch | None = None, limits: Device | None = None
) -> State:
    """The state after each sequence of a dense batch, without reading out: segments' summaries, merged. C is not looked at."""
    with sound_assembler(inp.x.device):
        begun = _begin(inp, Gate(), state, None, launch, limits or device_limits(inp.x.device), closed=True)
        sizes, table, turned = begun.sizes, begun.table, begun.angles
        S = entering_states(inp, begun.v, sizes, table, begun.c, turned.phase, state, begun.options)
        assert S is not None  # a sequence has two segments at least, one of them empty
        S = S.index_select(0, table.sequence_segments.sum(1) - 1)
        B_prev, x_prev = last_token(inp, sizes, table, turned.phi)
    return State(turned.phi, S, B_prev, x_prev, None if state is None else state.conv)


class Begun(NamedTuple):
    """What the matrix stages of one call share: tables, coefficients, angles, tensors or descriptors, constants."""

    sizes: Sizes
    table: Tables
    c: Coefficients
    angles: Angles
    v: dict
    options: dict


def _begin(
    inp: Inputs, gate: Gate, state: State | None, cu_seqlens: list[int] | None, launch: Launch | None, limits: Device,
    *, closed: bool = False,
) -> Begun:  # fmt: skip
    """closed: with an empty segment after each sequence."""
    b, t, H, P = inp.x.shape
    sizes = Sizes(H, inp.B.shape[-2], inp.rank, P, inp.B.shape[-1], inp.theta.shape[-1])
    boundaries = tuple(range(0, b * t + 1, t)) if cu_seqlens is None else tuple(cu_seqlens)
    launch = launch or choose(limits, inp.x.dtype, inp.rank, suits_bulk(inp, gate, sizes, boundaries))
    made = closed_tables if closed else tables
    table = made(boundaries, launch.tokens, segment_programs(limits, H), inp.x.device)

    c = coefficients(inp, table, launch.tokens)
    turned = angles(inp, sizes, table, launch.tokens, None if state is None else state.phi.contiguous())
    v = tiles(inp, gate, sizes, launch, turned.turn)
    exact = inp.x.dtype == torch.float32
    options = dict(
        L=launch.tokens, EXACT=exact, HARDWARE=limits.nvidia and not exact, BULK=launch.bulk, STAGES=launch.stages,
        DTYPE=TRITON_TYPES[inp.x.dtype], HAS_BIAS_B=inp.B_bias is not None, HAS_MIMO_X=inp.mimo_x is not None,
        num_warps=launch.num_warps, **sizes.channels(),
    )  # fmt: skip
    return Begun(sizes, table, c, turned, v, options)


def _scan(
    inp: Inputs, gate: Gate, state: State | None, cu_seqlens: list[int] | None, launch: Launch | None, limits: Device,
    wide: bool,
) -> ScanOutput:  # fmt: skip
    b, t, H, P = inp.x.shape
    sizes, table, c, turned, v, options = _begin(inp, gate, state, cu_seqlens, launch, limits)
    S_in = entering_states(inp, v, sizes, table, c, turned.phase, state, options)

    fused = gate.z is not None and gate.norm == "none"
    shape = (b, t, H, P) if fused else (b, t, sizes.R, H, P)
    narrow = not wide and (fused or gate.z is None)
    y = torch.empty(shape, device=inp.x.device, dtype=inp.x.dtype if narrow else torch.float32)
    S = torch.empty(table.sequences.shape[0], H, P, sizes.N, device=inp.x.device, dtype=torch.float32)
    at(output_kernel, (H, table.segments.shape[0]))(
        v["x"], v["z"] if fused else None, v["B"], v["C"], _parameter(inp.B_bias), _parameter(inp.C_bias),
        _parameter(inp.mimo_x), _parameter(gate.mimo_z), _parameter(gate.mimo_o), _parameter(inp.D),
        c.decay, c.decay_low, c.source, c.source_low, c.gamma, v["turn"], turned.phase, S if S_in is None else S_in,
        int(S_in is not None), table.segments, y, S, c.decay.shape[1], v["x_row"], v["z_row"],
        HAS_BIAS_C=inp.C_bias is not None, HAS_MIMO_Z=fused and gate.mimo_z is not None,
        HAS_MIMO_O=fused and gate.mimo_o is not None, HAS_D=inp.D is not None, HAS_Z=fused, **options,
    )  # fmt: skip
    if gate.z is not None and not fused:
        y = apply_gate(y, gate).to(inp.x.dtype)
    B_prev, x_prev = last_token(inp, sizes, table, turned.phi)
    return ScanOutput(y, State(turned.phi, S, B_prev, x_prev, None if state is None else state.conv))
