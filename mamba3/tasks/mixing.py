"""What a Mamba-3 layer does between its projections, for models [m, ...] at once: at every token, or at one a sequence.

    y_t = C_t . (sum_{s < t} exp(sums_t - sums_s) w_s B_s x_s + gamma_t B_t x_t) + D x_t,    gated by silu(z_t)

B and C carry their biases and are turned by phi (mathematics.md, sections 1 to 3). The scores of a chunk of tokens are one
matrix; between chunks passes the state. Law: `mamba3.ops.scan` with the gate, to rounding (through the tests of `folded`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mamba3.ops.decay import between
from mamba3.ops.discretize import discretize, heavy_tail
from mamba3.ops.rotate import rotate_pairs, wrap
from mamba3.tasks.widened import Sizes, Switches

SMALLEST_WEIGHT = 1e-30  # whose logarithm is taken


class Rows(NamedTuple):
    """What a layer projects, of each row of the residual stream: z, x [m, ..., h p], normed B, C [m, ..., r n], raw
    [m, ..., 3 h + a], that is dt, A, lambda, theta."""

    z: Tensor | None
    x: Tensor | None
    B: Tensor | None
    C: Tensor | None
    raw: Tensor | None


class Weighted(Function):
    """scores [..., l, l] times exp(sums_l - from_s) below the diagonal, gamma on it, zero above.

    from_s = sums_s - log w_s, so that a row's and a column's sum of one product are the gradients of both.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, sums: Tensor, origins: Tensor, gamma: Tensor) -> Tensor:
        size = scores.shape[-1]
        above = torch.full((size, size), -torch.inf, dtype=scores.dtype, device=scores.device).triu_()
        weights = (sums.unsqueeze(-1) - origins.unsqueeze(-2)).add_(above).exp_()
        weights.diagonal(dim1=-2, dim2=-1).copy_(gamma)
        result = scores * weights
        ctx.save_for_backward(weights, result, scores.diagonal(dim1=-2, dim2=-1).clone())
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        weights, result, diagonal = ctx.saved_tensors
        product = grad * result
        product.diagonal(dim1=-2, dim2=-1).zero_()
        grad_gamma = grad.diagonal(dim1=-2, dim2=-1) * diagonal
        return grad * weights, product.sum(-1), -product.sum(-2), grad_gamma


class _Keys(NamedTuple):
    """x [m, b, h, t, r, p]; B [m, b, h, t, r, n], biased and turned; log_alpha, w, gamma [m, b, h, t]; phi
    [m, b, h, t, a]."""

    x: Tensor
    B: Tensor
    log_alpha: Tensor
    w: Tensor
    gamma: Tensor
    phi: Tensor


def _switch(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


class Coefficients(NamedTuple):
    """log_alpha, w, gamma, tick [m, b, t, h]; theta [m, b, t, a] in radians a unit of tick; frequencies [a] of RoPE."""

    log_alpha: Tensor
    w: Tensor
    gamma: Tensor
    tick: Tensor
    theta: Tensor
    frequencies: Tensor


def coefficients(sizes: Sizes, which: Switches, layer: dict[str, Tensor], raw: Tensor) -> Coefficients:
    """Every nonlinearity of the coefficients: raw [m, b, t, 3 h + a] of the projection."""
    dt, A, lam, theta = raw.split([sizes.heads, sizes.heads, sizes.heads, sizes.pairs], dim=-1)
    dt = F.softplus(dt + layer["mixer.dt_bias"][:, None, None])
    A = -torch.where(_switch(which.heavy) > 0, heavy_tail(A), F.softplus(A)).clamp(min=sizes.A_floor)
    lam = torch.where(_switch(which.fixed) > 0, _switch(which.lam), lam.sigmoid())
    c = discretize(dt, A, lam)
    w = c.gamma + F.pad(c.halo[:, :, 1:], (0, 0, 0, 1))
    tick, theta = dt * _switch(which.turns), math.pi * theta.tanh()
    return Coefficients(c.log_alpha, w, c.gamma, tick, theta, _frequencies(sizes, dt))


def _frequencies(sizes: Sizes, like: Tensor) -> Tensor:
    return 10000.0 ** -(torch.arange(sizes.pairs, device=like.device, dtype=like.dtype) / max(sizes.pairs, 1))


def _keys(sizes: Sizes, which: Switches, layer: dict[str, Tensor], rows: Rows) -> _Keys:
    """Coefficients and angles, and B with bias and turned."""
    assert rows.x is not None and rows.B is not None and rows.raw is not None
    x = rows.x.unflatten(-1, (sizes.heads, 1, sizes.p)).permute(0, 1, 3, 2, 4, 5)
    if sizes.r > 1:
        x = x * layer["mixer.mimo_x"][:, None, :, None]
    c = coefficients(sizes, which, layer, rows.raw)
    log_alpha, w, gamma, tick = (v.transpose(2, 3).contiguous() for v in c[:4])
    turn = c.theta.unsqueeze(2) * tick.unsqueeze(-1) + c.frequencies * _switch(which.rope).unsqueeze(-1)
    phi = wrap(turn.double().cumsum(3)).to(w.dtype)
    return _Keys(x, _turned(sizes, rows.B, layer["mixer.B_bias"], phi), log_alpha, w, gamma, phi)


def _turned(sizes: Sizes, v: Tensor, bias: Tensor, phi: Tensor) -> Tensor:
    """v [m, b, t, r n] with bias [m, h, r, n], turned by phi [m, b, h, t, a]: [m, b, h, t, r, n]."""
    v = v.unflatten(-1, (sizes.r, sizes.n)).unsqueeze(2)
    return rotate_pairs(v + bias[:, None, :, None], phi.cos().unsqueeze(-2), phi.sin().unsqueeze(-2))


def mix(sizes: Sizes, which: Switches, layer: dict[str, Tensor], rows: Rows, chunks: int) -> Tensor:
    """What a layer's out_proj reads, [m, b, t, h p], of rows [m, b, t, ...]; `chunks` divides t."""
    assert rows.x is not None and rows.C is not None and rows.z is not None
    keys, r, chunk = _keys(sizes, which, layer, rows), sizes.r, rows.x.shape[2] // chunks

    def cut(v: Tensor) -> Tensor:  # [m, b, h, t, ...] to [m, b, h, k, l, ...]
        return v.unflatten(3, (chunks, chunk))

    x, B = cut(keys.x).flatten(4, 5), cut(keys.B).flatten(4, 5)
    C = cut(_turned(sizes, rows.C, layer["mixer.C_bias"], keys.phi)).flatten(4, 5)
    w, gamma, sums = cut(keys.w), cut(keys.gamma), cut(keys.log_alpha.double()).cumsum(-1).to(x.dtype)
    scores = C @ B.mT
    if r == 1:
        scores = Weighted.apply(scores, sums, sums - w.clamp(min=SMALLEST_WEIGHT).log(), gamma)
    else:
        weights = between(sums, w, gamma)[..., :, None, :, None]
        scores = (scores.unflatten(-1, (chunk, r)).unflatten(-3, (chunk, r)) * weights).flatten(-2).flatten(-3, -2)
    y = scores @ x
    if chunks > 1:
        y = y + _from_earlier_chunks(x, B, C, w, sums, r)
    y = y.unflatten(4, (chunk, r)).flatten(3, 4) + layer["mixer.D"][:, None, :, None, None, None] * keys.x
    return _gated(sizes, layer, y.permute(0, 1, 3, 2, 4, 5), rows.z).flatten(-2)


def mix_by_kernels(sizes: Sizes, which: Switches, layer: dict[str, Tensor], rows: Rows, chunks: int) -> Tensor:
    """`mix` of one rank in float32 by `mamba3.tasks.mixing_kernels`, which have chunks of their own."""
    from mamba3.tasks.coefficient_kernels import Coefficients as Fused
    from mamba3.tasks.coefficient_kernels import firsts_of
    from mamba3.tasks.mixing_kernels import Mixed, tf32

    assert rows.x is not None and rows.B is not None and rows.C is not None and rows.z is not None
    assert rows.raw is not None and sizes.r == 1
    log_alpha, w, gamma, tick, theta = Fused.apply(
        rows.raw,
        layer["mixer.dt_bias"],
        which.turns,
        which.fixed,
        which.lam,
        which.heavy,
        sizes.A_floor,
        firsts_of(rows.raw),
    )
    c = Coefficients(log_alpha, w, gamma, tick, theta, _frequencies(sizes, log_alpha))
    x, z = (v.unflatten(-1, (sizes.heads, sizes.p)) for v in (rows.x, rows.z))
    B_bias, C_bias = (layer[f"mixer.{name}"].squeeze(2) for name in ("B_bias", "C_bias"))
    return Mixed.apply(
        x, rows.B, rows.C, z, c.theta, c.tick, which.rope, c.frequencies, c.log_alpha, c.w, c.gamma, B_bias, C_bias,
        layer["mixer.D"], tf32(),
    ).flatten(-2)  # fmt: skip


def _from_earlier_chunks(x: Tensor, B: Tensor, C: Tensor, w: Tensor, sums: Tensor, r: int) -> Tensor:
    """What the state that enters each chunk adds to y, [m, b, h, k, l r, p]."""
    last = sums[..., -1:]
    out = ((last - sums).exp() * w).repeat_interleave(r, -1)
    local, total = B.mT @ (x * out.unsqueeze(-1)), last.exp().unsqueeze(-1)
    S, entering = torch.zeros_like(local[:, :, :, 0]), []
    for j in range(x.shape[3]):
        entering.append(S)
        S = torch.addcmul(local[:, :, :, j], S, total[:, :, :, j])
    into = sums.exp().repeat_interleave(r, -1)
    return (C @ torch.stack(entering, 3)) * into.unsqueeze(-1)


def mix_at(sizes: Sizes, which: Switches, layer: dict[str, Tensor], rows: Rows, positions: Tensor) -> Tensor:
    """`mix` at one token of each sequence: [m, b, h p]; z and C of `rows` are that token's, [m, b, ...]."""
    assert rows.C is not None and rows.z is not None
    keys, b = _keys(sizes, which, layer, rows), len(positions)

    def pick(v: Tensor) -> Tensor:  # [m, b, h, t, ...] at the asked token, t = 1
        tail = v.shape[4:]
        return v.gather(3, positions.view(1, b, 1, 1, *(1,) * len(tail)).expand(*v.shape[:3], 1, *tail))

    C = _turned(sizes, rows.C.unsqueeze(2), layer["mixer.C_bias"], pick(keys.phi))  # [m, b, h, 1, r, n]
    sums = keys.log_alpha.double().cumsum(3)
    i = torch.arange(keys.w.shape[3], device=C.device)
    earlier, same = (i < positions[:, None])[None, :, None], (i == positions[:, None])[None, :, None]
    weights = (pick(sums) - sums).masked_fill(~earlier, -torch.inf).to(C.dtype).exp() * keys.w
    weights = torch.where(same, keys.gamma, weights)[..., None, None]
    if sizes.r == 1:
        y = ((C * keys.B).sum(-1, keepdim=True) * weights * keys.x).sum(3)
    else:
        scores = torch.einsum("mbhrn,mbhtsn->mbhtrs", C.squeeze(3), keys.B) * weights
        y = torch.einsum("mbhtrs,mbhtsp->mbhrp", scores, keys.x)
    y = y + layer["mixer.D"][:, None, :, None, None] * pick(keys.x).squeeze(3)
    return _gated(sizes, layer, y.unsqueeze(2), rows.z.unsqueeze(2)).flatten(2)


def _gated(sizes: Sizes, layer: dict[str, Tensor], y: Tensor, z: Tensor) -> Tensor:
    """y [m, b, t, h, r, p] and z [m, b, t, h p] to [m, b, t, h, p]."""
    z = z.unflatten(-1, (sizes.heads, 1, sizes.p))
    if sizes.r == 1:
        return (y * F.silu(z)).squeeze(-2)
    y = y * F.silu(z * layer["mixer.mimo_z"][:, None, None])
    return (y * layer["mixer.mimo_o"][:, None, None]).sum(-2)
