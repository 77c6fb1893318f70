"""One token (mathematics.md, section 3): the state moves on and is read out.

Both outer products of the update are one matrix product over 2R columns:
    S_t = alpha_t S_{t-1} + [halo_t alpha_t x_{t-1} | gamma_t x_t] [B_{t-1} | B_t]^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba3.ops.discretize import discretize
from mamba3.ops.gate import apply_gate
from mamba3.ops.ranks import per_head, per_rank
from mamba3.ops.rotate import phase_dtype, rotate_pairs, wrap
from mamba3.ops.types import Gate, Inputs, ScanOutput, State, without_autocast


def _columns(x: Tensor, B: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [b, r, h, p], B [b, r, h, n], weight [b, h] to [b, h, p, r] and [b, h, r, n]."""
    return (x * weight[:, None, :, None]).permute(0, 2, 3, 1), B.transpose(1, 2)


def advance(inp: Inputs, gate: Gate, state: State, *, inplace: bool) -> ScanOutput:
    """One token: inputs without the token axis, y [b, h, p] (or [b, r, h, p] without gate), and the next state.

    inplace: write S into `state` instead of a new tensor; only where no gradient is recorded.
    """
    wide, dtype, nheads = inp.wide, inp.x.dtype, state.S.shape[1]
    c = discretize(inp.dt, inp.A, inp.lam)
    alpha = c.log_alpha.exp()
    tick = inp.dt if inp.tick is None else inp.tick
    turned = inp.theta.unsqueeze(1) * tick.unsqueeze(-1)
    phi = wrap(state.phi.to(phase_dtype(turned.device)) + turned).to(wide)  # a float32 sum always errs to one side
    cos, sin = phi.cos().unsqueeze(1), phi.sin().unsqueeze(1)
    B = rotate_pairs(per_head(inp.B.to(wide), inp.B_bias, nheads), cos, sin).to(dtype)
    C = rotate_pairs(per_head(inp.C.to(wide), inp.C_bias, nheads), cos, sin)

    x = per_rank(inp.x.to(wide), inp.mimo_x)
    old_x, old_B = _columns(per_rank(state.x_prev.to(wide), inp.mimo_x), state.B_prev.to(wide), c.halo * alpha)
    new_x, new_B = _columns(x, B.to(wide), c.gamma)
    columns, rows = torch.cat([old_x, new_x], dim=-1).flatten(0, 1), torch.cat([old_B, new_B], dim=-2).flatten(0, 1)
    decay = alpha[..., None, None]
    S = (state.S.mul_(decay) if inplace else state.S * decay).flatten(0, 1)
    S = S.baddbmm_(columns, rows) if inplace else torch.baddbmm(S, columns, rows)
    y = torch.bmm(S, C.permute(0, 2, 3, 1).flatten(0, 1)).unflatten(0, state.S.shape[:2]).permute(0, 3, 1, 2)
    if inp.D is not None:
        y = y + inp.D[:, None].to(wide) * x
    y = y if gate.z is None else apply_gate(y, gate)
    return ScanOutput(y.to(dtype), State(phi, S.view_as(state.S), B, inp.x, state.conv))


def step(inp: Inputs, gate: Gate, state: State, *, inplace: bool = False) -> ScanOutput:
    """`advance` outside autocast; with `inplace` the given state itself is updated and returned."""
    with without_autocast(inp.x.device):
        y, after = advance(inp, gate, state, inplace=inplace)
    return ScanOutput(y, state.copy_(after)) if inplace else ScanOutput(y, after)
