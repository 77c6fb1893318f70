"""Chunk-parallel evaluation in PyTorch: CPU and any GPU, with autograd (mathematics.md, section 3, closed form).

    y_t = C_t . decay(0 -> t) Shat_0 + sum_{s < t} decay(s -> t) w_s (C_t . B_s) x_s + gamma_t (C_t . B_t) x_t
    w_s = gamma_s + halo_{s+1}                              Shat = state plus the halo of the token that follows it

Within a chunk this is three matrix products a head; a token's R ranks are R rows, and causality compares tokens. Between
chunks only Shat passes on, as [n, p]. Stages: decays, phases, rotate, pass (chunk states), read out, gate.

Blocks of chunks are recomputed in the backward pass, so that training keeps the inputs, one y, and a state a block:
memory is linear in tokens and holds no per-head B or C, let alone a (tokens, h, p, n) tensor.
"""

from __future__ import annotations

import functools
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba3.ops import packed
from mamba3.ops.decay import Decays, between, decays
from mamba3.ops.discretize import discretize
from mamba3.ops.gate import apply_gate
from mamba3.ops.packed import Chunks
from mamba3.ops.ranks import per_head, per_rank
from mamba3.ops.rotate import BiasedRotation, phase_dtype, rotate_pairs, wrap
from mamba3.ops.types import Gate, Inputs, ScanOutput, State, transformed, without_autocast

# Rows of one chunk (tokens times ranks): longer ones cost matrix work in their square, shorter ones pass on more states;
# 32, 48 and 64 are within 3 % of one another on a CPU.
# Rows of one block of chunks: on a CPU what a block touches should stay in the cache; a GPU wants to be filled.
ROWS_PER_CHUNK = 64
BLOCK_ROWS_CPU, BLOCK_ROWS_GPU = 256, 16384


def phases(theta: Tensor, tick: Tensor, phi: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """From theta [k, l, a] and tick [k, h, l]: the angle before each chunk [k, h, a], and after each sequence [s, h, a]."""
    wide = phase_dtype(phi.device)
    turned = tick.to(wide) @ theta.to(wide)
    before, after = chunks.sums_along_sequences(turned)
    starts = wrap(chunks.spread(phi.to(wide)) + before)
    return starts.to(theta.dtype), wrap(phi.to(wide) + after).to(theta.dtype)


def pass_states(local: Tensor, total: Tensor, S: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """What enters each chunk [k, h, n, p] and what leaves the block, from local states and S [s, h, n, p]."""
    if ranks == 1:
        return S, torch.addcmul(local, S, total[..., None, None])
    by_rank = (v.unflatten(0, (ranks, -1)).unbind() for v in (local, total[..., None, None]))
    steps = zip(*by_rank, strict=True)
    if not torch.is_grad_enabled():
        states = torch.empty(ranks + 1, *S.shape, dtype=S.dtype, device=S.device)
        states[0] = S
        for j, (added, decay) in enumerate(steps):
            torch.addcmul(added, states[j], decay, out=states[j + 1])
        return states[:-1].flatten(0, 1), states[-1]
    entering = []
    for added, decay in steps:
        entering.append(S)
        S = torch.addcmul(added, S, decay)
    return torch.cat(entering), S


def rotated(v: Tensor, bias: Tensor | None, angle: Tensor, wide: torch.dtype) -> Tensor:
    """v [q, k, l, r, g, n] to columns [q, k, h, n, l r], with bias [q, 1, h, n, 1 or l r], turned by angle [k, h, a, l];
    dtype of v."""
    q, k, l, r, g, n = v.shape
    h = angle.shape[1]
    columns = v.to(wide).permute(0, 1, 4, 5, 2, 3).flatten(4, 5).contiguous()
    columns = columns.unsqueeze(3).expand(q, k, g, h // g, n, l * r).reshape(q, k, h, n, l * r)
    return BiasedRotation.apply(columns, bias, each_rank(angle, r)).to(v.dtype)


def each_rank(v: Tensor, rank: int) -> Tensor:
    """v [..., l] for each row of a token, [..., l r]."""
    return v if rank == 1 else v.unsqueeze(-1).expand(*v.shape, rank).flatten(-2)


class Block(NamedTuple):
    """One block's share: x, theta, B, C, z [k, l, ...]; tick [k, h, l]; start [k, h, a], the angle before each chunk."""

    x: Tensor
    theta: Tensor
    B: Tensor
    C: Tensor | None
    z: Tensor | None
    tick: Tensor
    start: Tensor
    decay: Decays


def _work(
    block: Block, inp: Inputs, gate: Gate, bias: Tensor | None, S: Tensor, ranks: int, out: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """y of a block of `ranks` chunks a sequence, [k, l, ...] (None without C), in `out` if given; the state after it."""
    dtype, wide, decay = inp.x.dtype, inp.wide, block.decay
    theta = block.theta.transpose(1, 2).contiguous().unsqueeze(1)  # [k, 1, a, l]
    angle = (block.tick.unsqueeze(2) * theta).cumsum(3) + block.start.unsqueeze(3)
    shared = torch.stack([block.B] if block.C is None else [block.B, block.C])
    B, *C = rotated(shared, bias, angle, wide).unbind(0)
    x = per_rank(block.x, inp.mimo_x).to(dtype).permute(0, 3, 1, 2, 4).contiguous()

    by_token = x.shape[2:4]
    weighted = (x * decay.out[..., None, None].to(dtype)).flatten(2, 3)
    local = B @ weighted
    entering, S = pass_states(local.to(wide), decay.total, S, ranks)
    if not C:
        return None, S

    rows = C[0].transpose(-1, -2)
    scores = (rows @ B).unflatten(3, by_token).unflatten(2, by_token)
    weights = between(decay.sums, decay.w, decay.gamma)[:, :, :, None, :, None]
    fresh = dtype == wide and not torch.is_grad_enabled()
    scores = scores.mul_(weights) if fresh else (scores * weights).to(dtype)
    scores = scores.flatten(4, 5).flatten(2, 3)
    intra = (scores @ x.flatten(2, 3)).unflatten(2, by_token)
    inter = (rows @ entering.to(dtype)).unflatten(2, by_token)
    add_product = torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_
    y = add_product(intra.to(wide), inter.to(wide), decay.into[..., None, None])
    if inp.D is not None:
        y = add_product(y, x.to(wide), inp.D[:, None, None, None].to(wide))
    y = y.permute(0, 2, 3, 1, 4)
    y = y if block.z is None else apply_gate(y, gate._replace(z=block.z), out)
    if out is None:
        return y.to(dtype), S
    return (y if y is out else out.copy_(y)), S


def plan(
    inp: Inputs, gate: Gate, state: State, chunks: Chunks, outputs: bool
) -> tuple[list[tuple[Block, int]], Tensor]:
    """What does not depend on the state S: the blocks, each with its number of sequences, and the angle after each one."""
    rows = BLOCK_ROWS_CPU if inp.x.device.type == "cpu" else BLOCK_ROWS_GPU
    spans = list(chunks.blocks(max(1, rows // inp.rank)))
    sizes = [(stop - start) * n for start, stop, n in spans]
    c = discretize(inp.dt, inp.A, inp.lam)
    decay = decays(*(chunks.coefficient(v) for v in (c.log_alpha, c.gamma + chunks.next_halo(c.halo), c.gamma)))
    tick = chunks.coefficient(inp.dt if inp.tick is None else inp.tick).transpose(1, 2)
    thetas = chunks.pieces(inp.theta, spans)
    starts, phi = phases(torch.cat(thetas), tick, state.phi, chunks)

    def each(v: Tensor | None) -> list[Tensor] | list[None]:
        return [None] * len(spans) if v is None or not outputs else chunks.pieces(v, spans)

    blocks = zip(
        chunks.pieces(inp.x, spans), thetas, chunks.pieces(inp.B, spans), each(inp.C), each(gate.z),
        tick.split(sizes), starts.split(sizes), zip(*(v.split(sizes) for v in decay), strict=True), strict=True,
    )  # fmt: skip
    made = [Block(*shares, Decays(*factors)) for *shares, factors in blocks]  # pyright: ignore[reportCallIssue]
    return [(block, n) for block, (_, _, n) in zip(made, spans, strict=True)], phi


def entering_state(inp: Inputs, state: State, halo: Tensor) -> Tensor:
    """Shat: S plus the halo [s, h] of the sequence's first token on the state's last B and x."""
    x = per_rank(state.x_prev.to(inp.wide), inp.mimo_x)
    return state.S + halo[..., None, None] * torch.einsum("brhp,brhn->bhpn", x, state.B_prev.to(inp.wide))


def last_rotated(inp: Inputs, chunks: Chunks, phi: Tensor) -> Tensor:
    """B of each sequence's last token, rotated by the final phi: what the state keeps."""
    B = per_head(chunks.last_token(inp.B).to(inp.wide), inp.B_bias, phi.shape[1])
    return rotate_pairs(B, phi.cos().unsqueeze(1), phi.sin().unsqueeze(1)).to(inp.B.dtype)


def _stacked_bias(inp: Inputs, nheads: int, length: int, outputs: bool) -> Tensor | None:
    """The biases of B and C as one tensor [q, 1, h, n, 1 or l r], or None where neither has one."""
    wanted = (inp.B_bias, inp.C_bias) if outputs else (inp.B_bias,)
    if all(bias is None for bias in wanted):
        return None
    zero = torch.zeros(nheads, inp.rank, inp.B.shape[-1], dtype=inp.wide, device=inp.B.device)
    bias = torch.stack([zero if bias is None else bias.to(inp.wide) for bias in wanted]).transpose(2, 3).unsqueeze(1)
    return bias if inp.rank == 1 else bias.repeat(1, 1, 1, 1, length)


@functools.cache
def _keep_freed_memory() -> None:
    """glibc gives freed blocks back to the system and faults them in again, page by page, for every block of the scan
    (seen with glibc 2.36: up to 5 times slower); it stops once it has freed a mapping of 32 MiB, its largest threshold."""
    del_me = torch.empty(2**25 - 2**16, dtype=torch.uint8)
    del del_me


def run(
    inp: Inputs, gate: Gate, state: State, chunks: Chunks, *, outputs: bool, recompute: bool
) -> tuple[Tensor | None, State]:
    """All blocks in order; y is None when `outputs` is False (a segment's summary needs the state alone)."""
    if inp.x.device.type == "cpu" and not torch.compiler.is_compiling():
        _keep_freed_memory()
    blocks, phi = plan(inp, gate, state, chunks, outputs)
    bias = _stacked_bias(inp, state.S.shape[1], chunks.length, outputs)
    S = entering_state(inp, state, chunks.first_token((1 - inp.lam) * inp.dt)).transpose(-1, -2).contiguous()
    S = S if chunks.order is None else S.index_select(0, chunks.order)
    whole, outs = None, repeat(None)
    if outputs and not torch.is_grad_enabled() and not torch.compiler.is_exporting():  # which wants no sizes of a split
        shape = inp.x.shape[2:] if gate.z is not None else (inp.rank, *inp.x.shape[2:])
        whole = inp.x.new_empty(sum(block.x.shape[0] for block, _ in blocks), chunks.length, *shape)
        outs = whole.split([block.x.shape[0] for block, _ in blocks])
    recompute = recompute and torch.is_grad_enabled() and not transformed(inp.x)
    ys, finished = [], []
    for (block, n), out in zip(blocks, outs, strict=False):
        if n < S.shape[0]:
            finished.append(S[n:])
            S = S[:n]
        arguments = (block, inp, gate, bias, S, block.x.shape[0] // n)
        if recompute:
            y, S = checkpoint(_work, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, S = _work(*arguments, out)
        ys.append(y)
    if finished:
        S = torch.cat([S, *reversed(finished)])
    if chunks.order is not None:
        S = S.index_select(0, torch.argsort(chunks.order))
    S = S.transpose(-1, -2).clone(memory_format=torch.contiguous_format)  # not a view of all the states of a block
    final = State(phi, S, last_rotated(inp, chunks, phi), chunks.last_token(inp.x), state.conv)
    if not outputs:
        return None, final
    return chunks.put(ys if whole is None else [whole]), final


def table(inp: Inputs, cu_seqlens: list[int] | None) -> Chunks:
    """The chunk table of these inputs: about as many rows a chunk as pay on the device, and never fewer than 16 tokens."""
    batch, tokens = inp.x.shape[:2]
    length = min(max(16, ROWS_PER_CHUNK // inp.rank), tokens)
    if cu_seqlens is None:
        return packed.dense(batch, tokens, length)
    return packed.packed(tuple(cu_seqlens), length, inp.x.device)


def scan(inp: Inputs, gate: Gate, state: State, cu_seqlens: list[int] | None, *, recompute: bool = True) -> ScanOutput:
    """The recurrence over all tokens; `recompute=False` trades memory for a backward without a second forward."""
    with without_autocast(inp.x.device):
        y, state = run(inp, gate, state, table(inp, cu_seqlens), outputs=True, recompute=recompute)
    assert y is not None
    return ScanOutput(y, state)


def final_state(inp: Inputs, state: State) -> State:
    """The state after all tokens of a dense batch, without reading out."""
    with without_autocast(inp.x.device):
        return run(inp, Gate(), state, table(inp, None), outputs=False, recompute=True)[1]
