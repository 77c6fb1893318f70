"""What the gradient of the last state adds to those of a sequence's inputs, and the gradient of the state it was given.

Small sums over sequences, in PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mamba3.ops.ranks import per_head
from mamba3.ops.rotate import rotate_pairs
from mamba3.ops.triton.call import Buffers, Call
from mamba3.ops.types import State


class LastState(NamedTuple):
    """Gradients of the state after each sequence; None where nothing depends on it."""

    phi: Tensor | None = None
    S: Tensor | None = None
    B_prev: Tensor | None = None
    x_prev: Tensor | None = None


def _turn_gradient(S: Tensor, dS: Tensor, A: int) -> Tensor:
    """The gradient [s, h, a] of turning S [s, h, p, n] by an angle."""
    return (dS[..., A : 2 * A] * S[..., :A] - dS[..., :A] * S[..., A : 2 * A]).sum(-2)


def last_token(call: Call, last: LastState, phi: Tensor, out: Buffers) -> Tensor | None:
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


def add_turn(call: Call, d_phi: Tensor, boundaries: tuple[int, ...], out: Buffers) -> None:
    """Every token of a sequence turns its last state, by theta tick: d_phi [s, h, a] of the last state, to both."""
    if not call.sizes.A:
        return
    theta, tick = call.inp.theta.flatten(0, 1), call.tick.flatten(0, 1)  # [t, a], [t, h]
    for d, begin, end in zip(d_phi.double(), boundaries[:-1], boundaries[1:], strict=True):
        out.dtheta[begin:end] += (tick[begin:end].double() @ d).float()
        out.rows.tick[:, begin:end] += (d @ theta[begin:end].double().T).float()


def given_state(call: Call, state: State, dS: Tensor, d_phi: Tensor | None, out: Buffers) -> tuple[State, Tensor]:
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
