"""The definition: float64, one token after another (mathematics.md, sections 2 to 4).

    phi_t = phi_{t-1} + theta_t tick_t
    S_t = alpha_t S_{t-1} + beta_t sum_r x_{t-1,r} (x) B_{t-1,r} + gamma_t sum_r x_{t,r} (x) B_{t,r}
    y_{t,r} = S_t C_{t,r} + D x_{t,r}

Everything else is held to this, and this to vectors of the official release. Slow on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba3.ops.discretize import discretize
from mamba3.ops.gate import apply_gate
from mamba3.ops.ranks import per_head, per_rank
from mamba3.ops.rotate import rotate_pairs, wrap
from mamba3.ops.types import Gate, Inputs, ScanOutput, State


def _double(values):
    return type(values)(*(v.double() if isinstance(v, Tensor) else v for v in values))


def _sequence(inp: Inputs, gate: Gate, state: State) -> ScanOutput:
    phi, S, B_prev, x_prev = state[:4]
    x_prev = per_rank(x_prev, inp.mimo_x)
    x, tick = per_rank(inp.x, inp.mimo_x), inp.dt if inp.tick is None else inp.tick
    B, C = per_head(inp.B, inp.B_bias, S.shape[1]), per_head(inp.C, inp.C_bias, S.shape[1])
    c = discretize(inp.dt, inp.A, inp.lam)
    outputs = []
    for t in range(x.shape[1]):
        phi = phi + inp.theta[:, t, None] * tick[:, t, :, None]
        cos, sin = phi.cos().unsqueeze(1), phi.sin().unsqueeze(1)
        B_t, C_t = rotate_pairs(B[:, t], cos, sin), rotate_pairs(C[:, t], cos, sin)
        alpha, halo, gamma = (v[:, t, :, None, None] for v in (c.log_alpha.exp(), c.halo, c.gamma))
        S = alpha * S + halo * alpha * torch.einsum("brhp,brhn->bhpn", x_prev, B_prev)
        S = S + gamma * torch.einsum("brhp,brhn->bhpn", x[:, t], B_t)
        outputs.append(torch.einsum("bhpn,brhn->brhp", S, C_t))
        B_prev, x_prev = B_t, x[:, t]
    y = torch.stack(outputs, dim=1)
    if inp.D is not None:
        y = y + inp.D[:, None] * x
    y = y if gate.z is None else apply_gate(y, gate)
    return ScanOutput(y, State(wrap(phi), S, B_prev, inp.x[:, -1], state.conv))


def scan(inp: Inputs, gate: Gate, state: State, cu_seqlens: list[int] | None) -> ScanOutput:
    """The definition in float64, whatever the dtype of the inputs; y and state are float64."""
    inp, gate, state = _double(inp), _double(gate), _double(state)
    if cu_seqlens is None:
        return _sequence(inp, gate, state)

    def tokens(values, i: int, per_token: tuple[str, ...]):
        span = slice(cu_seqlens[i], cu_seqlens[i + 1])
        return values._replace(**{f: getattr(values, f)[:, span] for f in per_token if getattr(values, f) is not None})

    runs = [
        _sequence(
            tokens(inp, i, ("x", "dt", "A", "lam", "theta", "B", "C", "tick")),
            tokens(gate, i, ("z",)),
            state.select([i]),
        )
        for i in range(len(cu_seqlens) - 1)
    ]
    states = [run.state for run in runs]
    joined = State(
        phi=torch.cat([s.phi for s in states]),
        S=torch.cat([s.S for s in states]),
        B_prev=torch.cat([s.B_prev for s in states]),
        x_prev=torch.cat([s.x_prev for s in states]),
        conv=state.conv,
    )
    return ScanOutput(torch.cat([run.y for run in runs], dim=1), joined)
