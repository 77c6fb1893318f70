"""A few tokens that may be taken back: read from a state that stays, which then moves on by as many of them as are wanted.

With the last token read before them as token 0, whose weight is the halo of the first, c tokens give, for every c at once,
    S_c = decay(0 -> c) S_0 + sum_{s <= c} W_cs x_s B_s^T        W_cs = decay(s -> c) w_s for s < c, gamma_c for s = c
    y_c = S_c C_c = decay(0 -> c) S_0 C_c + sum_{s <= c} W_cs (C_c . B_s) x_s
so that reading needs S_0 once, and what is kept of a token is its factors: x, B of rank R, its angle, its row of W.

Law: verify, then accept(counts), is the scan of the first counts[i] tokens of each sequence. Every count has one shape, and
nothing is asked of the device: both can be captured in a CUDA graph. For few tokens: W grows with their square.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba3.ops.decay import between
from mamba3.ops.discretize import discretize
from mamba3.ops.gate import apply_gate
from mamba3.ops.ranks import per_head, per_rank
from mamba3.ops.rotate import phase_dtype, rotate_pairs, wrap
from mamba3.ops.types import Gate, Inputs, State, without_autocast


class Factors(NamedTuple):
    """What is kept of t tokens, with the one before them in front: phi [b, 1 + t, h, a], into [b, h, 1 + t] the decay from
    the state to each, weights [b, h, 1 + t, 1 + t], B [b, 1 + t, r, h, n] rotated, x [b, 1 + t, h, p] before mimo_x."""

    phi: Tensor
    into: Tensor
    weights: Tensor
    B: Tensor
    x: Tensor
    mimo_x: Tensor | None


def _columns(v: Tensor) -> Tensor:
    """[b, t, r, h, m] to [b h, t r, m]: the rows that the products of one head take."""
    return v.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _decay(inp: Inputs) -> tuple[Tensor, Tensor]:
    """Factors.into and Factors.weights."""
    c = discretize(inp.dt, inp.A, inp.lam)
    log_alpha, gamma = F.pad(torch.stack([c.log_alpha, c.gamma]).transpose(2, 3), (1, 0))
    w = gamma + F.pad(c.halo.transpose(1, 2), (0, 1))  # of the last token gamma alone: what follows it is not known
    sums = log_alpha.to(phase_dtype(log_alpha.device)).cumsum(2)
    return sums.to(inp.wide).exp(), between(sums, w, gamma)


def _rotated(inp: Inputs, phi: Tensor) -> tuple[Tensor, Tensor]:
    """B and C [b, t, r, h, n], with their biases and turned by phi [b, t, h, a]."""
    bias, both = None, torch.cat([inp.B, inp.C], dim=2).to(inp.wide)
    if inp.B_bias is not None or inp.C_bias is not None:
        zero = torch.zeros((), dtype=inp.wide, device=phi.device).expand(phi.shape[2], inp.rank, inp.B.shape[-1])
        bias = torch.cat([zero if v is None else v.to(inp.wide) for v in (inp.B_bias, inp.C_bias)], dim=1)
    turned = rotate_pairs(per_head(both, bias, phi.shape[2]), phi.cos().unsqueeze(2), phi.sin().unsqueeze(2))
    B, C = turned.split(inp.rank, dim=2)
    return B.to(inp.x.dtype), C


@torch.no_grad()
def verify(inp: Inputs, gate: Gate, state: State) -> tuple[Tensor, Factors]:
    """Inputs [b, t, ...] after a state, which is not changed: y [b, t, h, p] (or [b, t, r, h, p] without gate), the factors."""
    wide, (b, t), h, r = inp.wide, inp.x.shape[:2], state.S.shape[1], inp.rank
    with without_autocast(inp.x.device):
        into, weights = _decay(inp)
        exact, tick = phase_dtype(state.phi.device), inp.dt if inp.tick is None else inp.tick
        turned = inp.theta.to(exact).unsqueeze(2) * tick.to(exact).unsqueeze(-1)
        phi = wrap(state.phi.to(exact).unsqueeze(1) + turned.cumsum(1)).to(wide)
        B, C = _rotated(inp, phi)
        B = torch.cat([state.B_prev.to(B.dtype).unsqueeze(1), B], dim=1)
        x = torch.cat([state.x_prev.to(inp.x.dtype).unsqueeze(1), inp.x], dim=1)

        ranks, rows = per_rank(x.to(wide), inp.mimo_x), _columns(C)
        scores = torch.bmm(rows, _columns(B.to(wide)).transpose(1, 2))
        scores.view(b, h, t, r, 1 + t, r).mul_(weights[:, :, 1:, None, :, None])
        y = torch.bmm(rows, state.S.to(wide).flatten(0, 1).transpose(1, 2)).view(b, h, t, r, -1)
        y.mul_(into[:, :, 1:, None, None])
        y = torch.baddbmm(y.view(b * h, t * r, -1), scores, _columns(ranks)).view_as(y).permute(0, 2, 3, 1, 4)
        if inp.D is not None:
            y = y + inp.D[:, None].to(wide) * ranks[:, 1:]
        y = y if gate.z is None else apply_gate(y, gate)
    phi = torch.cat([state.phi.to(wide).unsqueeze(1), phi], dim=1)
    return y.to(inp.x.dtype), Factors(phi, into, weights, B, x, inp.mimo_x)


@torch.no_grad()
def accept(factors: Factors, state: State, counts: Tensor) -> None:
    """Move the state that `verify` was given on, in place, by the first counts[i] (0 to t) tokens of each sequence i.

    counts [b] int64. Of the other tokens nothing remains, not even where they were not finite.
    """
    wide, length = state.S.dtype, factors.x.shape[1]
    at = torch.arange(len(counts), device=counts.device), counts
    later = torch.arange(length, device=counts.device) > counts[:, None]
    weights = factors.weights[at[0], :, counts].transpose(1, 2)  # [b, 1 + t, h]
    x = per_rank(factors.x.to(wide), factors.mimo_x) * weights[:, :, None, :, None]
    x = x.masked_fill_(later[:, :, None, None, None], 0)
    B = factors.B.to(wide).masked_fill(later[:, :, None, None, None], 0)
    S = state.S.mul_(factors.into[at[0], :, counts][..., None, None]).flatten(0, 1)
    with without_autocast(S.device):
        S.baddbmm_(_columns(x).transpose(1, 2), _columns(B))
    for mine, theirs in ((state.phi, factors.phi), (state.B_prev, factors.B), (state.x_prev, factors.x)):
        mine.copy_(theirs[at])
