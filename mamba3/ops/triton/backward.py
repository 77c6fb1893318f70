# type: ignore  the arguments of a launch are constants of the kernel, which pyright takes for wrong types
"""The backward pass: from the inputs alone; chunk states are computed again, a window of the sequence at a time.

coefficients, turns, phases -> (summaries and merges, where a sequence is split) -> for each window: states in both
directions, gradient_rows, gradient_bc -> gradient_dt -> what the last state and the given state add
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mamba3.ops.ranks import per_head
from mamba3.ops.rotate import rotate_pairs
from mamba3.ops.triton.assembler import sound_assembler
from mamba3.ops.triton.forward import TRITON_TYPES, Angles, Coefficients, Sizes, angles, coefficients, rows
from mamba3.ops.triton.gradient_bc import gradient_bc_kernel
from mamba3.ops.triton.gradient_dt import gradient_dt_kernel
from mamba3.ops.triton.gradient_rows import gradient_rows_kernel
from mamba3.ops.triton.launch import BackwardLaunch, Device, choose_backward, device_limits, padded, segment_programs
from mamba3.ops.triton.segments import merge_kernel
from mamba3.ops.triton.states import reverse_merge_kernel, states_kernel
from mamba3.ops.triton.windows import Plan, Window, plan
from mamba3.ops.types import Gate, Inputs, State

# Bytes of the states of a window's chunks, for each direction of time; half of it where one window is not enough. As much
# again, for each of B and C, holds the gradients of their rows.
SCRATCH = 256 * 2**20
# Of the matrix stages. With 8 the compiler gives products that follow from one another all 8 along the 64 rows: it computes
# each of them twice.
WARPS = 4


class LastState(NamedTuple):
    """Gradients of the state after each sequence; None where nothing depends on it."""

    phi: Tensor | None = None
    S: Tensor | None = None
    B_prev: Tensor | None = None
    x_prev: Tensor | None = None


class Gradients(NamedTuple):
    """Of every tensor argument, in its own shape; None where the argument is."""

    inp: Inputs
    gate: Gate
    state: State | None


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


def _prepare(
    inp: Inputs, gate: Gate, state: State | None, boundaries: tuple[int, ...], dy: Tensor, limits: Device, scratch: int
) -> Call:
    H, P = inp.x.shape[2:]
    sizes = Sizes(H, inp.B.shape[-2], inp.rank, P, inp.B.shape[-1], inp.theta.shape[-1])
    exact = inp.x.dtype == torch.float32
    launch = choose_backward(limits, inp.x.dtype, sizes.R)
    tokens = launch.tokens
    most = max(1, scratch // (H * P * sizes.N * inp.x.element_size()))
    if inp.x.shape[0] * inp.x.shape[1] > most * tokens:
        most = max(1, most // 2)  # long sequences: their own tensors leave less room
    table = plan(boundaries, tokens, segment_programs(limits, H), most, inp.x.device)
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
    states_kernel[(call.sizes.H, segments[1] - segments[0])](
        inp.x, gate.z, call.dy, vectors, bias, inp.mimo_x, gate.mimo_z, gate.mimo_o, c.decay, c.decay_low, c.weight,
        call.angles.turn, call.angles.phase, tables.segments, tables.sequences, start, each, end, total, segments[0],
        c_first, c.decay.shape[1], call.x_row, call.z_row, REVERSE=reverse, SUMMARY=total is not None,
        HAS_START=start is not None, HAS_END=end is not None, HAS_BIAS=bias is not None, STAGES=call.launch.stages,
        **call.constants, num_warps=WARPS,
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
    PB = min(16, triton.next_power_of_2(sizes.P))
    merge_kernel[(sizes.H, tables.sequences.shape[0], triton.cdiv(sizes.P, PB))](
        S, total, given.S, given.x_prev, given.B_prev, inp.mimo_x, inp.dt, inp.lam, tables.sequences,
        tables.sequence_segments, H=sizes.H, R=sizes.R, P=sizes.P, PB=PB, N=sizes.N,
        NP=triton.next_power_of_2(sizes.N), HAS_STATE=state is not None, HAS_MIMO_X=inp.mimo_x is not None, num_warps=4,
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
    reverse_merge_kernel[(sizes.H, tables.sequences.shape[0], triton.cdiv(PN, BLOCK))](
        S, total, dS, tables.sequence_segments, H=sizes.H, PN=PN, BLOCK=BLOCK, HAS_FINAL=dS is not None, num_warps=4
    )
    return S


class Rows(NamedTuple):
    """What `gradient_dt` wants, in float32: rows [h, t], kept [c, h] of each chunk, and tick [part, h, t], to be summed."""

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


def _add(call: Call, out: Buffers, name: str, part: Tensor | None) -> None:
    if part is not None:
        out.parameters[name] = out.parameters[name] + part.sum(0) if name in out.parameters else part.sum(0)


def _gradient_rows(call: Call, window: Window, S: Tensor, dS: Tensor, dB: Tensor, dC: Tensor, out: Buffers) -> None:
    """What a window's chunks give; the gradients of rotated B and C of each head go to dB and dC [c, h, l r, n]."""
    inp, gate, c, sizes = call.inp, call.gate, call.c, call.sizes
    (c0, c1), H = window.chunks, sizes.H
    like = dict(device=S.device, dtype=torch.float32)
    dD = torch.empty(c1 - c0, H, **like) if inp.D is not None else None
    mimo = [
        None if v is None else torch.empty(c1 - c0, H, sizes.R, sizes.P, **like)
        for v in (inp.mimo_x, gate.mimo_z, gate.mimo_o)
    ]
    gradient_rows_kernel[(H, c1 - c0)](
        inp.x, gate.z, inp.B, inp.C, inp.B_bias, inp.C_bias, inp.mimo_x, gate.mimo_z, gate.mimo_o, inp.D, call.dy,
        c.decay, c.decay_low, c.weight, c.gamma, call.angles.turn, call.angles.phase, S, dS, call.plan.chunks, out.dx,
        out.dz, dB, dC, *out.rows[:5], out.turning, dD, *mimo, c0, window.segments[0], c.decay.shape[1], call.x_row,
        call.z_row, HAS_BIAS_B=inp.B_bias is not None, HAS_BIAS_C=inp.C_bias is not None, HAS_D=inp.D is not None,
        **call.constants, num_warps=WARPS,
    )  # fmt: skip
    for name, part in zip(("D", "mimo_x", "mimo_z", "mimo_o"), (dD, *mimo), strict=True):
        _add(call, out, name, part)


def parts_of_channels(sizes: Sizes, launch: BackwardLaunch) -> tuple[int, int, int, int]:
    """Pairs and unrotated channels a program of gradient_bc, and how many parts of each there are."""
    U = sizes.N - 2 * sizes.A
    AB, UB = min(padded(sizes.A), launch.pairs), min(padded(U), launch.rest)
    return AB, UB, triton.cdiv(sizes.A, AB), triton.cdiv(U, UB)


def _gradient_bc(call: Call, window: Window, dB: Tensor, dC: Tensor, out: Buffers, *, leaving: bool) -> None:
    """From the rows of each head to the gradients of B, C, their biases, theta and tick, for the window's tokens."""
    inp, c, sizes = call.inp, call.c, call.sizes
    (c0, c1), (t0, t1), per_group = window.chunks, window.tokens, sizes.H // sizes.G
    heads = min(per_group, 2 ** (max(1, 2 * (c1 - c0) * sizes.H // call.programs).bit_length() - 1))
    blocks, tokens = triton.cdiv(per_group, heads), t1 - t0
    like = dict(device=dB.device, dtype=torch.float32)
    shared = [v[t0 * sizes.R : t1 * sizes.R] for v in (out.dB, out.dC)]
    parts = shared if blocks == 1 else [torch.empty(blocks, *v.shape, **like) for v in shared]
    theta = torch.empty(sizes.G * blocks, tokens, sizes.A, **like)
    biases = [
        None if bias is None else torch.empty(c1 - c0, sizes.H, sizes.R, sizes.N, **like)
        for bias in (inp.B_bias, inp.C_bias)
    ]
    AB, UB, pair_parts, rest_parts = parts_of_channels(sizes, call.launch)
    options = {} if call.launch.registers is None else {"maxnreg": call.launch.registers}
    gradient_bc_kernel[(sizes.G * blocks, c1 - c0, pair_parts + 2 * rest_parts)](
        inp.theta, call.tick, inp.B, inp.C, inp.B_bias, inp.C_bias, call.angles.turn, call.angles.phase, dB, dC,
        out.turning, call.plan.chunks, *parts, theta, out.rows.tick, *biases, c0, t0, tokens, c.decay.shape[1],
        **{name: call.constants[name] for name in ("H", "G", "R", "RP", "N", "A", "L", "EXACT", "HARDWARE", "DTYPE")},
        AB=AB, PARTS=pair_parts, UB=UB, HEADS=heads, HAS_BIAS_B=inp.B_bias is not None,
        HAS_BIAS_C=inp.C_bias is not None, LEAVING=leaving, STAGES=call.launch.stages_bc, num_warps=call.launch.warps,
        **options,
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
    z, chunks, parts = call.gate.z, call.plan.chunks.shape[0], parts_of_channels(sizes, call.launch)[2]
    out = Buffers(
        torch.empty(T, H, P, device=inp.x.device, dtype=inp.x.dtype),
        None if z is None else torch.empty(T, H, P, device=z.device, dtype=z.dtype),
        *(torch.empty(T * sizes.R, sizes.G, N, device=inp.x.device, dtype=inp.x.dtype) for _ in range(2)),
        torch.empty(T, sizes.A, **like),
        Rows(*(torch.empty(shape, **like) for shape in [(H, row)] * 4 + [(chunks, H), (parts, H, row)])),
        torch.empty(chunks, H, sizes.A, **like), {},
    )  # fmt: skip
    first = None if state is None else torch.empty(call.plan.tables.sequences.shape[0], H, P, N, **like)
    count = max(w.chunks[1] - w.chunks[0] for w in call.plan.windows)
    slots = max(w.chunks[1] - w.chunks[0] + w.segments[1] - w.segments[0] for w in call.plan.windows)
    S, dS = (inp.x.new_empty((slots, H, P, N)) for _ in range(2))
    dB, dC = (inp.x.new_empty((count, H, call.launch.tokens * sizes.R, N)) for _ in range(2))
    for window in call.plan.windows:
        _states(call, window.segments, window.chunks[0], entering, S, None, None, reverse=False)
        _states(call, window.segments, window.chunks[0], leaving, dS, first, None, reverse=True)
        _gradient_rows(call, window, S, dS, dB, dC, out)
        _gradient_bc(call, window, dB, dC, out, leaving=last.S is not None)
    return out, first


def _turn_gradient(S: Tensor, dS: Tensor, A: int) -> Tensor:
    """The gradient [s, h, a] of turning S [s, h, p, n] by an angle."""
    return (dS[..., A : 2 * A] * S[..., :A] - dS[..., :A] * S[..., A : 2 * A]).sum(-2)


def _last_token(call: Call, last: LastState, phi: Tensor, out: Buffers) -> Tensor | None:
    """Adds what the last state's B_prev and x_prev say of the last token; the gradient [s, h, a] that reaches phi there."""
    inp, sizes, sequences = call.inp, call.sizes, call.plan.tables.sequences.long()
    tokens = sequences[:, 3] - 1
    if last.x_prev is not None:
        out.dx[tokens] += last.x_prev.to(out.dx.dtype)
    d_phi = None if last.phi is None else last.phi.float()
    if last.B_prev is not None:
        dB, cos, sin = last.B_prev.float(), phi.cos().unsqueeze(1), phi.sin().unsqueeze(1)
        B = inp.B.view(-1, sizes.R, sizes.G, sizes.N)[tokens].float()
        turned = rotate_pairs(per_head(B, inp.B_bias, sizes.H), cos, sin)  # [s, r, h, n]
        back = rotate_pairs(dB, cos, -sin)
        shared = out.dB.view(-1, sizes.R, sizes.G, sizes.N)
        shared[tokens] += back.unflatten(2, (sizes.G, -1)).sum(3).to(shared.dtype)
        if inp.B_bias is not None:
            out.parameters["B_bias"] = out.parameters["B_bias"] + back.sum(0).transpose(0, 1)
        turn = _turn_gradient(turned.transpose(1, 2), dB.transpose(1, 2), sizes.A)
        d_phi = turn if d_phi is None else d_phi + turn
    if last.S is not None:
        turn = out.turning[sequences[:, 0] + sequences[:, 1] - 1]
        d_phi = turn if d_phi is None else d_phi + turn
    return d_phi


def _add_turn(call: Call, d_phi: Tensor, boundaries: tuple[int, ...], out: Buffers) -> None:
    """Every token of a sequence turns its last state, by theta tick: d_phi [s, h, a] of the last state, to both."""
    if not call.sizes.A:
        return
    theta, tick = call.inp.theta.flatten(0, 1), call.tick.flatten(0, 1)  # [t, a], [t, h]
    for d, begin, end in zip(d_phi.double(), boundaries[:-1], boundaries[1:], strict=True):
        out.dtheta[begin:end] += (tick[begin:end].double() @ d).float()
        out.rows.tick[0, :, begin:end] += (d @ theta[begin:end].double().T).float()


def _given_state(call: Call, state: State, dS: Tensor, d_phi: Tensor | None, out: Buffers) -> tuple[State, Tensor]:
    """Gradients of the state that was given, and of the halo [s, h] of each sequence's first token, from that of
    S + halo sum_r x_prev_r (x) B_prev_r. Sums in float64: they are small, and no setting may round them."""
    inp, A = call.inp, call.sizes.A
    first = call.plan.tables.sequences[:, 2].long()
    halo = ((1 - inp.lam) * inp.dt).flatten(0, 1)[first].double()[..., None, None]
    B, x, wide = state.B_prev.double().transpose(1, 2), state.x_prev.double(), dS.double()
    mimo = x.new_ones(1, 1, x.shape[-1]) if inp.mimo_x is None else inp.mimo_x.double()  # [h, r, p]
    x_ranks = x.unsqueeze(2) * mimo  # [s, h, r, p]
    seen = B @ wide.transpose(-1, -2)  # [s, h, r, p]
    d_halo = (seen * x_ranks).sum((-1, -2))
    if inp.mimo_x is not None:
        out.parameters["mimo_x"] = out.parameters["mimo_x"] + (halo * seen * x.unsqueeze(2)).sum(0).float()
    dB = (halo * (x_ranks @ wide)).transpose(1, 2)
    dx = (halo * seen * mimo).sum(2)
    S = state.S.double() + halo * (x_ranks.transpose(-1, -2) @ B)
    turn = -_turn_gradient(S, wide, A)
    turn = turn if d_phi is None else turn + d_phi
    given = State(turn.to(state.phi.dtype), dS.to(state.S.dtype), dB.to(state.B_prev.dtype), dx.to(state.x_prev.dtype))
    return given, d_halo.float().contiguous()


def _gradient_dt(call: Call, out: Buffers, d_halo: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of dt, A, lam and tick (empty where there is none), [t, h]."""
    inp, (H, row), T = call.inp, call.c.decay.shape, call.inp.x.shape[0] * call.inp.x.shape[1]
    d_dt, d_A, d_lam = (torch.empty(T, H, device=inp.dt.device, dtype=torch.float32) for _ in range(3))
    d_tick = torch.zeros_like(d_dt) if inp.tick is not None else d_dt
    HB = min(32, triton.next_power_of_2(H))
    gradient_dt_kernel[(call.plan.chunks.shape[0], triton.cdiv(H, HB))](
        inp.dt, inp.A, inp.lam, call.c.weight, call.plan.chunks, *out.rows, d_halo, d_dt, d_A, d_lam, d_tick, row, H=H,
        L=call.launch.tokens, HB=HB, HAS_STATE=d_halo is not None, TURNS=call.sizes.A > 0, HAS_TICK=inp.tick is not None,
        PARTS=out.rows.tick.shape[0], EXACT=call.constants["EXACT"], num_warps=4,
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
    scratch: int = SCRATCH,
) -> Gradients:
    """Gradients of `forward.scan` with out norm "none", from that of y and of the last state.

    Arguments as `forward.scan` takes them. scratch: bytes of chunk states that are kept at a time, for each direction.
    """
    b, t = inp.x.shape[:2]
    boundaries = tuple(range(0, b * t + 1, t)) if cu_seqlens is None else tuple(cu_seqlens)
    with sound_assembler(inp.x.device):
        call = _prepare(inp, gate, state, boundaries, dy, limits or device_limits(inp.x.device), scratch)
        out, first = _windows(call, state, last)
        d_phi = _last_token(call, last, call.angles.phi, out)
        if d_phi is not None:
            _add_turn(call, d_phi, boundaries, out)
        given, d_halo = None, None
        if state is not None and first is not None:
            given, d_halo = _given_state(call, state, first, d_phi, out)
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
