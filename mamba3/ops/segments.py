"""Segments: summarise, merge, apply (mathematics.md, section 5).

A segment scanned from the zero state summarises to (phi = sum theta tick, log_decay = sum A dt, S_local, B_last, x_last) and
the halo coefficient of its first token. Two neighbours merge to the summary of their union:

    S = exp(Lambda_2) (S_1 + halo_2 sum_r x_last_1 (x) B_last_1) + R(phi_1) S_2        phi = phi_1 + phi_2
    Lambda = Lambda_1 + Lambda_2        B_last = R(phi_1) B_last_2        x_last = x_last_2        halo = halo_1

where R(phi) rotates the n axis. The decay is one number a head, so the merge is elementwise and associative: it joins
chunks, splits of a long sequence, and ranks of a context-parallel group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.ops.discretize import discretize
from mamba3.ops.ranks import per_rank
from mamba3.ops.rotate import rotate_pairs, wrap
from mamba3.ops.scan import Implementation, final_state
from mamba3.ops.types import Gate, Inputs, State, without_autocast
from mamba3.ops.validation import check


class Summary(NamedTuple):
    """What a segment does to any state that enters it.

    phi [b, h, a] radians; log_decay [b, h]; halo [b, h], (1 - lam) dt of the first token; S [b, h, p, n] from the zero
    state; B_last [b, r, h, n] in the segment's own frame; x_last [b, h, p].
    """

    phi: Tensor
    log_decay: Tensor
    halo: Tensor
    S: Tensor
    B_last: Tensor
    x_last: Tensor


def _rotate(v: Tensor, phi: Tensor) -> Tensor:
    return rotate_pairs(v, phi.cos().to(v.dtype), phi.sin().to(v.dtype))


def _halo_term(halo: Tensor, x_last: Tensor, B_last: Tensor, mimo_x: Tensor | None, wide: torch.dtype) -> Tensor:
    outer = torch.einsum("brhp,brhn->bhpn", per_rank(x_last.to(wide), mimo_x), B_last.to(wide))
    return halo[..., None, None] * outer


def summarize(
    x_bthp: Tensor,
    dt_bth: Tensor,
    A_bth: Tensor,
    lam_bth: Tensor,
    theta_bta: Tensor,
    B_btrgn: Tensor,
    *,
    B_bias_hrn: Tensor | None = None,
    mimo_x_hrp: Tensor | None = None,
    tick_bth: Tensor | None = None,
    impl: Implementation = "auto",
) -> Summary:
    """The summary of a segment; arguments as in `mamba3.ops.scan`, which needs C too. auto takes what a scan would take."""
    inp, *_ = check(
        Inputs(x_bthp, dt_bth, A_bth, lam_bth, theta_bta, B_btrgn, B_btrgn, B_bias_hrn, None, mimo_x_hrp, None, tick_bth),
        Gate(), None, None,
    )  # fmt: skip
    state = final_state(inp, impl)
    with without_autocast(inp.x.device):
        c = discretize(inp.dt, inp.A, inp.lam)
        log_decay = c.log_alpha.double().sum(1) if c.log_alpha.device.type != "mps" else c.log_alpha.sum(1)
    return Summary(state.phi, log_decay.to(inp.wide), c.halo[:, 0], state.S, state.B_prev, state.x_prev)


def merge(first: Summary, second: Summary, mimo_x_hrp: Tensor | None = None) -> Summary:
    """The summary of two neighbouring segments as one; differentiable, associative."""
    wide = first.S.dtype
    entered = first.S + _halo_term(second.halo, first.x_last, first.B_last, mimo_x_hrp, wide)
    decay = second.log_decay.exp()[..., None, None]
    return Summary(
        phi=wrap(first.phi + second.phi),
        log_decay=first.log_decay + second.log_decay,
        halo=first.halo,
        S=decay * entered + _rotate(second.S, first.phi.unsqueeze(-2)),
        B_last=_rotate(second.B_last.to(wide), first.phi.unsqueeze(1)).to(second.B_last.dtype),
        x_last=second.x_last,
    )


def apply(state: State, segment: Summary, mimo_x_hrp: Tensor | None = None) -> State:
    """The state after a segment, from the state before it: equal to scanning the segment from `state`."""
    before = Summary(
        state.phi,
        torch.zeros_like(segment.log_decay),
        torch.zeros_like(segment.halo),
        state.S,
        state.B_prev,
        state.x_prev,
    )
    after = merge(before, segment, mimo_x_hrp)
    return State(after.phi, after.S, after.B_last, after.x_last, state.conv)
