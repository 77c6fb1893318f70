"""Chunk-parallel evaluation in PyTorch: CPU and any GPU, with autograd (mathematics.md, section 3, closed form).

    y_t = C_t . decay(0 -> t) Shat_0 + sum_{s < t} decay(s -> t) w_s (C_t . B_s) x_s + gamma_t (C_t . B_t) x_t
    w_s = gamma_s + halo_{s+1}                              Shat = state plus the halo of the token that follows it

Within a chunk this is three matrix products a head; a token's R ranks are R rows, and causality compares tokens. Between
chunks only Shat [p, n] passes on. Stages: decays, phases, rotate, pass (chunk states), read out, gate.

Blocks of chunks are recomputed in the backward pass, so that training keeps the inputs, one y, and a state a block:
memory is linear in tokens and holds no per-head B or C, let alone a (tokens, h, p, n) tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba3.ops import packed
from mamba3.ops.discretize import discretize
from mamba3.ops.gate import apply_gate
from mamba3.ops.packed import Chunks
from mamba3.ops.ranks import per_head, per_rank
from mamba3.ops.rotate import phase_dtype, rotate_pairs, rotate_pairs_, wrap
from mamba3.ops.types import Gate, Inputs, ScanOutput, State, without_autocast

ROWS_PER_CHUNK = 64
# Rows a block: on a CPU what a block touches should stay in the second-level cache; a GPU wants to be filled.
BLOCK_ROWS_CPU = 256
BLOCK_ROWS_GPU = 16384


class Decays(NamedTuple):
    """Of a block: between [k h l s] (diagonal gamma), into [k h l], out [k h l] (times w), total [k h]."""

    between: Tensor
    into: Tensor
    out: Tensor
    total: Tensor


def decays(log_alpha: Tensor, w: Tensor, gamma: Tensor, dtype: torch.dtype) -> Decays:
    """Decay factors of each chunk from [k, l, h] coefficients; exponents are float64 sums, their differences `dtype`."""
    sums = log_alpha.to(phase_dtype(log_alpha.device)).cumsum(1).transpose(1, 2)
    w, gamma = w.transpose(1, 2), gamma.transpose(1, 2)
    l = sums.shape[-1]
    exponent = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(dtype)
    not_past = torch.full((l, l), -torch.inf, dtype=dtype, device=sums.device).triu()
    between = (exponent + not_past).exp() * w.unsqueeze(-2)
    between.diagonal(dim1=-2, dim2=-1).add_(gamma)
    out = (sums[..., -1:] - sums).to(dtype).exp() * w
    return Decays(between, sums.to(dtype).exp(), out, sums[..., -1].to(dtype).exp())


def phases(theta: Tensor, tick: Tensor, phi: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Cumulative angles [k, h, l, a] of a block that starts at phi [s, h, a], and phi after it."""
    turned = (tick.transpose(1, 2).unsqueeze(-1) * theta.unsqueeze(1)).cumsum(2)
    starts = []
    for total in turned[:, :, -1].to(phi.dtype).chunk(ranks):
        starts.append(phi)
        phi = wrap(phi + total)
    start = starts[0] if ranks == 1 else torch.cat(starts)
    return turned + start.to(turned.dtype).unsqueeze(2), phi


def pass_states(local: Tensor, total: Tensor, S: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """What enters each chunk [k, h, p, n] and what leaves the block, from local states and S [s, h, p, n]."""
    entering = []
    for added, decay in zip(local.chunk(ranks), total[..., None, None].chunk(ranks), strict=True):
        entering.append(S)
        S = torch.addcmul(added, S, decay)
    return (entering[0] if ranks == 1 else torch.cat(entering)), S


def _heads_first(v: Tensor) -> Tensor:
    """[k, l, r, h, n] to [k, h, l r, n]: a token's ranks become rows."""
    return v.permute(0, 3, 1, 2, 4).flatten(2, 3)


def rotated(B: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, wide: torch.dtype) -> Tensor:
    """B [k, l, r, g, n] to rows [k, h, l r, n], biased and rotated by cos, sin [k, h, l, a], back in the dtype of B."""
    k, l, r, g, n = B.shape
    h = cos.shape[1]
    rows = B.to(wide).permute(0, 3, 1, 2, 4).unsqueeze(2).expand(k, g, h // g, l, r, n)
    rows = (rows.contiguous() if bias is None else rows + bias.unflatten(0, (g, h // g)).unsqueeze(2)).flatten(1, 2)
    rotate = rotate_pairs if torch.is_grad_enabled() else rotate_pairs_
    return rotate(rows, cos.unsqueeze(3), sin.unsqueeze(3)).to(B.dtype).flatten(2, 3)


class Plan(NamedTuple):
    """What all blocks of one call share."""

    inp: Inputs
    gate: Gate
    chunks: Chunks
    tick: Tensor
    log_alpha: Tensor
    w: Tensor
    gamma: Tensor
    outputs: bool


def _block(plan: Plan, start: int, stop: int, S: Tensor, phi: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """y of chunk ranks start..stop [k, l, ...] (None without outputs), and the state after them."""
    inp, gate = plan.inp, plan.gate
    take, coefficient = (
        lambda v: plan.chunks.take(v, start, stop),
        lambda v: plan.chunks.take_coefficient(v, start, stop),
    )
    dtype, wide = inp.x.dtype, inp.wide
    decay = decays(coefficient(plan.log_alpha), coefficient(plan.w), coefficient(plan.gamma), wide)
    angle, phi = phases(take(inp.theta), coefficient(plan.tick), phi, stop - start)
    cos, sin = angle.cos(), angle.sin()
    B = rotated(take(inp.B), inp.B_bias, cos, sin, wide)
    x = _heads_first(per_rank(take(inp.x), inp.mimo_x).to(dtype))

    k, h, rows, _ = x.shape
    by_token = (rows // inp.rank, inp.rank)
    weighted = (x.unflatten(2, by_token) * decay.out[..., None, None].to(dtype)).flatten(2, 3)
    local = weighted.transpose(-1, -2) @ B
    entering, S = pass_states(local.to(wide), decay.total, S, stop - start)
    if not plan.outputs:
        return None, S, phi

    C = rotated(take(inp.C), inp.C_bias, cos, sin, wide)
    scores = (C @ B.transpose(-1, -2)).view(k, h, *by_token, *by_token)
    scores = (scores * decay.between[:, :, :, None, :, None]).to(dtype).view(k, h, rows, rows)
    inter = (C @ entering.to(dtype).transpose(-1, -2)).unflatten(2, by_token)
    y = torch.addcmul((scores @ x).unflatten(2, by_token).to(wide), inter.to(wide), decay.into[..., None, None])
    if inp.D is not None:
        y = torch.addcmul(y, x.unflatten(2, by_token).to(wide), inp.D[:, None, None, None].to(wide))
    y = y.permute(0, 2, 3, 1, 4)
    return (y if gate.z is None else apply_gate(y, gate._replace(z=take(gate.z)))).to(dtype), S, phi


def entering_state(inp: Inputs, state: State, halo: Tensor) -> Tensor:
    """Shat: S plus the halo [s, h] of the sequence's first token on the state's last B and x."""
    x = per_rank(state.x_prev.to(inp.wide), inp.mimo_x)
    return state.S + halo[..., None, None] * torch.einsum("brhp,brhn->bhpn", x, state.B_prev.to(inp.wide))


def last_rotated(inp: Inputs, chunks: Chunks, phi: Tensor) -> Tensor:
    """B of each sequence's last token, rotated by the final phi: what the state keeps."""
    B = per_head(chunks.last_token(inp.B).to(inp.wide), inp.B_bias, phi.shape[1])
    return rotate_pairs(B, phi.cos().unsqueeze(1), phi.sin().unsqueeze(1)).to(inp.B.dtype)


def run(
    inp: Inputs, gate: Gate, state: State, chunks: Chunks, *, outputs: bool, recompute: bool
) -> tuple[Tensor | None, State]:
    """All blocks in order; y is None when `outputs` is False (a segment's summary needs the state alone)."""
    c = discretize(inp.dt, inp.A, inp.lam)
    w = c.gamma + chunks.next_halo(c.halo)
    tick = inp.dt if inp.tick is None else inp.tick
    plan = Plan(inp, gate, chunks, tick, c.log_alpha, w, c.gamma, outputs)
    S, phi = entering_state(inp, state, chunks.first_token(c.halo)), state.phi.to(phase_dtype(state.phi.device))
    if chunks.order is not None:
        S, phi = S.index_select(0, chunks.order), phi.index_select(0, chunks.order)
    recompute = recompute and torch.is_grad_enabled()
    rows = BLOCK_ROWS_CPU if inp.x.device.type == "cpu" else BLOCK_ROWS_GPU

    ys, finished = [], []
    for start, stop, n in chunks.blocks(max(1, rows // inp.rank)):
        if n < S.shape[0]:
            finished.append((S[n:], phi[n:]))
            S, phi = S[:n], phi[:n]
        if recompute:
            y, S, phi = checkpoint(_block, plan, start, stop, S, phi, use_reentrant=False, preserve_rng_state=False)
        else:
            y, S, phi = _block(plan, start, stop, S, phi)
        ys.append(y)
    finished.append((S, phi))
    S, phi = (torch.cat([pair[i] for pair in reversed(finished)]) for i in (0, 1))
    if chunks.order is not None:
        back = torch.argsort(chunks.order)
        S, phi = S.index_select(0, back), phi.index_select(0, back)
    phi = phi.to(inp.wide)
    final = State(phi, S, last_rotated(inp, chunks, phi), chunks.last_token(inp.x), state.conv)
    return (chunks.put(ys) if outputs else None), final


def chunk_length(rank: int) -> int:
    """Tokens a chunk: about 64 rows, and never fewer than 16 tokens."""
    return max(16, ROWS_PER_CHUNK // rank)


def table(inp: Inputs, cu_seqlens: list[int] | None) -> Chunks:
    """The chunk table of these inputs."""
    batch, tokens = inp.x.shape[:2]
    length = min(chunk_length(inp.rank), tokens)
    if cu_seqlens is None:
        return packed.dense(batch, tokens, length)
    return packed.packed(cu_seqlens, length, inp.x.device)


def scan(inp: Inputs, gate: Gate, state: State, cu_seqlens: list[int] | None, *, recompute: bool = True) -> ScanOutput:
    """The recurrence over all tokens; `recompute=False` trades memory for a backward without a second forward."""
    with without_autocast(inp.x.device):
        y, state = run(inp, gate, state, table(inp, cu_seqlens), outputs=True, recompute=recompute)
    assert y is not None
    return ScanOutput(y, state)
