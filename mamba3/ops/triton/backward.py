# type: ignore  the arguments of a launch are constants of the kernel, which pyright takes for wrong types
"""The backward pass: from the inputs alone; chunk states are computed again, a window of the sequence at a time.

coefficients, turns, phases -> (summaries and merges, where a sequence is split) -> for each window: states in both
directions, gradient_rows, gradient_bc -> gradient_dt -> what the last state and the given state add
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.ops.triton.ahead import at
from mamba3.ops.triton.assembler import sound_assembler
from mamba3.ops.triton.call import Buffers, Call, Rows, prepare
from mamba3.ops.triton.ends import LastState, add_turn, given_state, last_token
from mamba3.ops.triton.gradient_bc import gradient_bc_kernel
from mamba3.ops.triton.gradient_dt import gradient_dt_kernel
from mamba3.ops.triton.gradient_rows import gradient_rows_kernel
from mamba3.ops.triton.launch import Device, Scratch, cdiv, choose_scratch, device_limits, padded, power_of_2
from mamba3.ops.triton.segments import merge_kernel
from mamba3.ops.triton.states import reverse_merge_kernel, states_kernel
from mamba3.ops.triton.windows import Piece, Window
from mamba3.ops.types import Gate, Inputs, State

# Of the matrix stages. With 8 the compiler gives products that follow from one another all 8 along the 64 rows: it computes
# each of them twice.
WARPS = 4


class Gradients(NamedTuple):
    """Of every tensor argument, in its own shape; None where the argument is."""

    inp: Inputs
    gate: Gate
    state: State | None


def _states(
    call: Call,
    segments: tuple[int, int],
    c_first: int,
    start: Tensor | None,
    each: Tensor | None,
    end: Tensor | None,
    total: Tensor | None,
    *,
    reverse: bool,
) -> None:
    """Chunk states of some segments, or their summaries where `total` is given."""
    inp, gate, c, tables = call.inp, call.gate, call.c, call.plan.tables
    vectors, bias = (inp.C, inp.C_bias) if reverse else (inp.B, inp.B_bias)
    at(states_kernel, (call.sizes.H, segments[1] - segments[0]))(
        inp.x, gate.z, call.dy, vectors, bias, inp.mimo_x, gate.mimo_z, gate.mimo_o, c.decay, c.decay_low, c.weight,
        call.angles.turn, call.angles.phase, tables.segments, tables.sequences, c.decay if start is None else start,
        int(start is not None), each, end, total, segments[0], c_first, c.decay.shape[1], call.x_row, call.z_row,
        REVERSE=reverse, SUMMARY=total is not None, HAS_END=end is not None, HAS_BIAS=bias is not None,
        STAGES=call.launch.stages, **call.constants, num_warps=WARPS,
    )  # fmt: skip


def _entering(call: Call, state: State | None) -> Tensor | None:
    """The state that enters each segment [k, h, p, n], or None where all are zero."""
    inp, sizes, tables = call.inp, call.sizes, call.plan.tables
    if state is None and not tables.split:
        return None
    count = tables.segments.shape[0]
    S = inp.x.new_empty((count, sizes.H, sizes.P, sizes.N), dtype=torch.float32)
    total = inp.x.new_empty((count, sizes.H), dtype=torch.float32)
    if tables.split:
        _states(call, (0, count), 0, None, None, S, total, reverse=False)
    given = State(S, S, S, S) if state is None else State(*(v.contiguous() for v in state[:4]))
    PB = min(16, power_of_2(sizes.P))
    at(merge_kernel, (sizes.H, tables.sequences.shape[0], cdiv(sizes.P, PB)))(
        S, total, given.S, given.x_prev, given.B_prev, inp.mimo_x, inp.dt, inp.lam, tables.sequences,
        tables.sequence_segments, H=sizes.H, R=sizes.R, P=sizes.P, PB=PB, N=sizes.N,
        NP=power_of_2(sizes.N), HAS_STATE=state is not None, HAS_MIMO_X=inp.mimo_x is not None, num_warps=4,
    )  # fmt: skip
    return S


def _leaving(call: Call, dS: Tensor | None) -> Tensor | None:
    """The gradient of the state that leaves each segment [k, h, p, n], or None where all are zero."""
    sizes, tables = call.sizes, call.plan.tables
    dS = None if dS is None else dS.float().contiguous()
    if not tables.split:
        return dS
    count = tables.segments.shape[0]
    S = call.dy.new_empty((count, sizes.H, sizes.P, sizes.N), dtype=torch.float32)
    total = call.dy.new_empty((count, sizes.H), dtype=torch.float32)
    _states(call, (0, count), 0, None, None, S, total, reverse=True)
    BLOCK, PN = 1024, sizes.P * sizes.N
    at(reverse_merge_kernel, (sizes.H, tables.sequences.shape[0], cdiv(PN, BLOCK)))(
        S, total, dS, tables.sequence_segments, H=sizes.H, PN=PN, BLOCK=BLOCK, HAS_FINAL=dS is not None, num_warps=4
    )
    return S


def _add(call: Call, out: Buffers, name: str, part: Tensor | None) -> None:
    if part is not None:
        out.parameters[name] = out.parameters[name] + part.sum(0) if name in out.parameters else part.sum(0)


def _gradient_rows(
    call: Call,
    window: Window,
    piece: Piece,
    S: Tensor,
    dS: Tensor,
    of_heads: tuple[Tensor, Tensor, Tensor],
    out: Buffers,
) -> None:
    """What a piece's chunks give. of_heads: what each head says of B and C [c, h, l r, n] and of the angles [c, h, l r, a]."""
    inp, gate, c, sizes = call.inp, call.gate, call.c, call.sizes
    (c0, c1), H = piece.chunks, sizes.H
    S, dS = (v[c0 - window.chunks[0] :] for v in (S, dS))
    like = dict(device=S.device, dtype=torch.float32)
    dD = torch.empty(c1 - c0, H, **like) if inp.D is not None else None
    mimo = [
        None if v is None else torch.empty(c1 - c0, H, sizes.R, sizes.P, **like)
        for v in (inp.mimo_x, gate.mimo_z, gate.mimo_o)
    ]
    at(gradient_rows_kernel, (H, c1 - c0))(
        inp.x, gate.z, inp.B, inp.C, inp.B_bias, inp.C_bias, inp.mimo_x, gate.mimo_z, gate.mimo_o, inp.D, call.dy,
        c.decay, c.decay_low, c.weight, c.gamma, call.angles.turn, call.angles.phase, S, dS, call.plan.chunks, out.dx,
        out.dz, *of_heads, *out.rows[:5], out.turning, dD, *mimo, c0, window.segments[0], c.decay.shape[1], call.x_row,
        call.z_row, HAS_BIAS_B=inp.B_bias is not None, HAS_BIAS_C=inp.C_bias is not None, HAS_D=inp.D is not None,
        **call.constants, num_warps=WARPS,
    )  # fmt: skip
    for name, part in zip(("D", "mimo_x", "mimo_z", "mimo_o"), (dD, *mimo), strict=True):
        _add(call, out, name, part)


def _gradient_bc(
    call: Call, piece: Piece, of_heads: tuple[Tensor, Tensor, Tensor], out: Buffers, *, leaving: bool
) -> None:
    """Sums over heads, of the piece's tokens."""
    inp, sizes = call.inp, call.sizes
    (c0, c1), (t0, t1), per_group = piece.chunks, piece.tokens, sizes.H // sizes.G
    heads = min(per_group, 2 ** (max(1, 2 * (c1 - c0) * sizes.H // call.programs).bit_length() - 1))
    blocks, tokens = cdiv(per_group, heads), t1 - t0
    like = dict(device=inp.x.device, dtype=torch.float32)
    shared = [v[t0 * sizes.R : t1 * sizes.R] for v in (out.dB, out.dC)]
    theta = torch.empty(sizes.G * blocks, tokens, sizes.A, **like)
    parts = [theta if blocks == 1 else torch.empty(blocks, *v.shape, **like) for v in shared]
    biases = [
        None if bias is None else torch.empty(c1 - c0, sizes.H, sizes.R, sizes.N, **like)
        for bias in (inp.B_bias, inp.C_bias)
    ]
    UB = min(padded(sizes.N), call.launch.channels)
    at(gradient_bc_kernel, (sizes.G * blocks, c1 - c0, 2 * cdiv(sizes.N, UB) + (sizes.A > 0)))(
        inp.theta, call.tick, *of_heads, out.turning, call.plan.chunks, out.dB, out.dC, *parts, theta, out.rows.tick,
        *biases, c0, t0, tokens, heads, call.c.decay.shape[1],
        **{name: call.constants[name] for name in ("H", "G", "R", "RP", "N", "A", "W", "L", "EXACT", "HARDWARE", "DTYPE")},
        UB=UB, LEAVING=leaving, HAS_BIAS_B=inp.B_bias is not None, HAS_BIAS_C=inp.C_bias is not None,
        STAGES=call.launch.stages_bc, num_warps=WARPS,
    )  # fmt: skip
    if blocks > 1:
        for v, part in zip(shared, parts, strict=True):
            v.copy_(part.sum(0))
    out.dtheta[t0:t1] = theta.sum(0)
    for name, part in zip(("B_bias", "C_bias"), biases, strict=True):
        _add(call, out, name, part)


def _windows(call: Call, state: State | None, last: LastState) -> tuple[Buffers, Tensor | None]:
    """What the windows fill, and, where a state was given, the gradient of the state that enters each sequence."""
    inp, sizes = call.inp, call.sizes
    H, P, N, T, row = sizes.H, sizes.P, sizes.N, inp.x.shape[0] * inp.x.shape[1], call.c.decay.shape[1]
    entering, leaving = _entering(call, state), _leaving(call, last.S)
    like = dict(device=inp.x.device, dtype=torch.float32)
    z, chunks, L = call.gate.z, call.plan.chunks.shape[0], call.launch.tokens
    out = Buffers(
        torch.empty(T, H, P, device=inp.x.device, dtype=inp.x.dtype),
        None if z is None else torch.empty(T, H, P, device=z.device, dtype=z.dtype),
        *(torch.empty(T * sizes.R, sizes.G, N, device=inp.x.device, dtype=inp.x.dtype) for _ in range(2)),
        torch.empty(T, sizes.A, **like),
        Rows(*(torch.empty(shape, **like) for shape in [(H, row)] * 4 + [(chunks, H), (H, row)])),
        torch.empty(chunks, H, sizes.A, **like), {},
    )  # fmt: skip
    first = None if state is None else torch.empty(call.plan.tables.sequences.shape[0], H, P, N, **like)
    count = max(p.chunks[1] - p.chunks[0] for w in call.plan.windows for p in w.pieces)
    slots = max(w.chunks[1] - w.chunks[0] + w.segments[1] - w.segments[0] for w in call.plan.windows)
    S, dS = (inp.x.new_empty((slots, H, P, N)) for _ in range(2))
    dB, dC, dphi = (inp.x.new_empty((count, H, L * sizes.R, n)) for n in (N, N, sizes.A))
    for window in call.plan.windows:
        _states(call, window.segments, window.chunks[0], entering, S, None, None, reverse=False)
        _states(call, window.segments, window.chunks[0], leaving, dS, first, None, reverse=True)
        for piece in window.pieces:
            _gradient_rows(call, window, piece, S, dS, (dB, dC, dphi), out)
            _gradient_bc(call, piece, (dB, dC, dphi), out, leaving=last.S is not None)
    return out, first


def _gradient_dt(call: Call, out: Buffers, d_halo: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of dt, A, lam and tick (empty where there is none), [t, h]."""
    inp, (H, row), T = call.inp, call.c.decay.shape, call.inp.x.shape[0] * call.inp.x.shape[1]
    d_dt, d_A, d_lam = (torch.empty(T, H, device=inp.dt.device, dtype=torch.float32) for _ in range(3))
    d_tick = torch.zeros_like(d_dt) if inp.tick is not None else d_dt
    HB = min(32, power_of_2(H))
    at(gradient_dt_kernel, (call.plan.chunks.shape[0], cdiv(H, HB)))(
        inp.dt, inp.A, inp.lam, call.c.weight, call.plan.chunks, *out.rows, d_halo, d_dt, d_A, d_lam, d_tick, row, H=H,
        L=call.launch.tokens, HB=HB, HAS_STATE=d_halo is not None, TURNS=call.sizes.A > 0, HAS_TICK=inp.tick is not None,
        EXACT=call.constants["EXACT"], HARDWARE=call.constants["HARDWARE"], num_warps=4,
    )  # fmt: skip
    return d_dt, d_A, d_lam, d_tick


def backward(
    inp: Inputs,
    gate: Gate,
    state: State | None,
    cu_seqlens: list[int] | None,
    dy: Tensor,
    last: LastState,
    *,
    limits: Device | None = None,
    scratch: Scratch | None = None,
) -> Gradients:
    """Gradients of `forward.scan` with out norm "none", from that of y and of the last state.

    Arguments as `forward.scan` takes them. scratch: what is held at a time; by the device's memory unless given.
    """
    b, t = inp.x.shape[:2]
    boundaries = tuple(range(0, b * t + 1, t)) if cu_seqlens is None else tuple(cu_seqlens)
    with sound_assembler(inp.x.device):
        limits = limits or device_limits(inp.x.device)
        call = prepare(inp, gate, state, boundaries, dy, limits, scratch or choose_scratch(limits))
        out, first = _windows(call, state, last)
        d_phi = last_token(call, last, call.angles.phi, out)
        if d_phi is not None:
            add_turn(call, d_phi, boundaries, out)
        given, d_halo = None, None
        if state is not None and first is not None:
            given, d_halo = given_state(call, state, first, d_phi, out)
        d_dt, d_A, d_lam, d_tick = _gradient_dt(call, out, d_halo)

    def shaped(v: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if v is None or like is None else v.view(like.shape).to(like.dtype)

    found = out.parameters
    return Gradients(
        Inputs(
            shaped(out.dx, inp.x), shaped(d_dt, inp.dt), shaped(d_A, inp.A), shaped(d_lam, inp.lam),
            shaped(out.dtheta, inp.theta), shaped(out.dB, inp.B), shaped(out.dC, inp.C),
            *(shaped(found.get(name), getattr(inp, name)) for name in ("B_bias", "C_bias", "mimo_x", "D")),
            shaped(d_tick, inp.tick),
        ),
        Gate(shaped(out.dz, gate.z), shaped(found.get("mimo_z"), gate.mimo_z), shaped(found.get("mimo_o"), gate.mimo_o)),
        given,
    )  # fmt: skip
