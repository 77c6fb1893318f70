"""Many models of one shape as one computation, where every sequence asks for one answer.

    logits [m, b, v] = head(norm(h at the asked token)),        parameters [m, ...] of m models, tokens [b, t] shared by all

The models' axis leads every product, so nothing goes through torch.vmap. Exact savings, as one position is asked: the first
layer projects the vocabulary's rows and spreads them over the tokens, the last one reads out, gates and projects one token.
Settings that are values of one equation (rotation, lam, biases, decay) are switches of a model: different rows of Table 5b
train in one stack. Law: the logits of `Stack`, to rounding.

What goes into the angles (dt, A, lam, theta) is projected in float64, so that a matrix unit's short float32 (TF32), where the
caller allows it, touches amplitudes only; sums along the sequence are float64 as everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mamba3.lm import Mamba3Config
from mamba3.ops.decay import between
from mamba3.ops.discretize import discretize, heavy_tail
from mamba3.ops.rotate import rotate_pairs, wrap

ROWS_PER_CHUNK = 256  # tokens times ranks whose scores are one matrix
PARTS = 32  # of the rows, at most, in a gradient's sum
SMALLEST_WEIGHT = 1e-30  # whose logarithm is taken
# What may differ between the models of a stack; everything else in their configurations is the same.
SWITCHES = ("rotation", "lam", "B_bias", "C_bias", "decay")


class Switches(NamedTuple):
    """Of each model, [m] of the parameters' dtype: turns (1: angles by data), rope (1: standard RoPE), fixed (1: lam is
    `lam`), lam, heavy (1: heavy-tail decay)."""

    turns: Tensor
    rope: Tensor
    fixed: Tensor
    lam: Tensor
    heavy: Tensor


@dataclass(frozen=True)
class Sizes:
    """Of one model: layers, heads, p, n, r, pairs (a), padded vocabulary, tokens, smallest decay rate, eps of the norms."""

    layers: int
    heads: int
    p: int
    n: int
    r: int
    pairs: int
    vocab: int
    answers: int
    A_floor: float
    eps: float

    @classmethod
    def of(cls, config: Mamba3Config) -> Sizes:
        """Those of a configuration. ValueError where it has what this computation lacks."""
        missing = [
            what
            for what, has in {
                "attention layers": set(config.layers) != {"mamba3"}, "an MLP": config.d_intermediate > 0,
                "a short convolution": config.d_conv > 0, "an output norm": config.out_norm != "none",
                "groups": config.ngroups > 1, "a head of its own": not config.tie_embeddings,
                "frozen biases": not config.bc_bias_trainable,
            }.items()
            if has
        ]  # fmt: skip
        if missing:
            raise ValueError(f"folded models are plain Mamba-3 blocks; this one has {', '.join(missing)}: use Stack.")
        heads = round(config.expand * config.d_model) // config.headdim
        pairs = int(config.d_state * config.rope_fraction) // 2
        return cls(
            len(config.layers), heads, config.headdim, config.d_state, config.mimo_rank, pairs,
            config.padded_vocab_size, config.vocab_size, config.A_floor, config.norm_eps,
        )  # fmt: skip


def switches(configs: list[Mamba3Config], device: torch.device | str, dtype: torch.dtype) -> Switches:
    """Those of each model. ValueError where the models differ in anything else."""
    shapes = {tuple(v for k, v in c.to_dict().items() if k not in SWITCHES) for c in configs}
    if len(shapes) > 1:
        raise ValueError(f"models of a stack may differ in {', '.join(SWITCHES)} alone; these differ in more.")

    def column(f) -> Tensor:
        return torch.tensor([float(f(c)) for c in configs], device=device, dtype=dtype)

    return Switches(
        column(lambda c: c.rotation == "data_dependent"), column(lambda c: c.rotation == "standard"),
        column(lambda c: c.lam != "learned"), column(lambda c: 0.5 if c.lam == "learned" else c.lam),
        column(lambda c: c.decay == "heavy_tail"),
    )  # fmt: skip


def widened(config: Mamba3Config, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's weights with zeros for what its configuration leaves out, and of each weight which entries exist (1)."""
    sizes, wide, exist = Sizes.of(config), {}, {}
    h, inner = sizes.heads, sizes.heads * sizes.p
    for name, value in weights.items():
        there = torch.ones_like(value)
        if name.endswith("in_proj.weight"):
            kept = _kept_rows(config, sizes, value.device)
            there = kept.to(value.dtype).unsqueeze(1).expand(-1, value.shape[1])
            value = value.new_zeros(len(kept), value.shape[1]).index_copy(0, kept.nonzero().squeeze(1), value)
        wide[name], exist[name] = value, there.contiguous()
    for i in range(sizes.layers):
        for bias in ("B_bias", "C_bias"):
            name = f"layers.{i}.mixer.{bias}"
            if name not in wide:
                wide[name] = exist[name] = weights["norm_f.weight"].new_zeros(h, sizes.r, sizes.n)
    assert wide["layers.0.mixer.in_proj.weight"].shape[0] == 2 * inner + 2 * sizes.r * sizes.n + 3 * h + sizes.pairs
    return wide, exist


def narrowed(config: Mamba3Config, wide: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `widened`: what Mamba3LM.from_weights takes."""
    sizes, weights = Sizes.of(config), {}
    for name, value in wide.items():
        if name.endswith("in_proj.weight"):
            value = value[_kept_rows(config, sizes, value.device)]
        absent = getattr(config, name.rpartition(".")[2], 0) is None
        if not absent:
            weights[name] = value.contiguous()
    return weights


def _kept_rows(config: Mamba3Config, sizes: Sizes, device: torch.device) -> Tensor:
    """Which rows of the wide in_proj the configuration has."""
    kept = torch.ones(2 * sizes.heads * sizes.p + 2 * sizes.r * sizes.n + 3 * sizes.heads + sizes.pairs, device=device)
    if config.lam != "learned":
        kept[len(kept) - sizes.pairs - sizes.heads : len(kept) - sizes.pairs] = 0
    if config.rotation != "data_dependent":
        kept[len(kept) - sizes.pairs :] = 0
    return kept > 0


def answer_logits(
    sizes: Sizes, which: Switches, parameters: dict[str, Tensor], tokens: Tensor, positions: Tensor, chunks: int = 1
) -> Tensor:
    """Logits [m, b, v] at position `positions` [b] of the sequences `tokens` [b, t]; parameters as `widened`, [m, ...].

    The tokens are worked on in `chunks` parts of equal length; the scores of each are one matrix.
    """
    b, t = tokens.shape
    table = parameters["embedding.weight"]
    ids = torch.arange(sizes.vocab, device=tokens.device)
    one_hot = (tokens.unsqueeze(-1) == ids).to(table.dtype)
    asked = (tokens.gather(1, positions.unsqueeze(1)) == ids).double()
    h = (asked @ table.double()).to(table.dtype)

    parts = math.gcd(PARTS, b)

    def spread(v: Tensor) -> Tensor:  # [m, vocabulary, c] to [m, b, t, c]; the gradient sums over t, then over b
        return one_hot.to(v.dtype) @ v.unsqueeze(1)

    every = None  # the residual stream at every token; the first layer needs only the table
    for i in range(sizes.layers):
        own = f"layers.{i}."
        layer = _Layer(sizes, which, {k.removeprefix(own): v for k, v in parameters.items() if k.startswith(own)})
        if every is None:
            inputs = layer.inputs(table, spread)
        else:
            inputs = layer.inputs(every.flatten(1, 2), lambda v: v.unflatten(1, (b, t)), parts)
        if i == sizes.layers - 1:
            if every is not None:
                h = every.gather(2, positions.view(1, b, 1, 1).expand(every.shape[0], b, 1, every.shape[3])).squeeze(2)
            logits = _normed(layer.at(inputs, h, positions), parameters["norm_f.weight"], sizes.eps) @ table.mT
            return logits[..., : sizes.answers]
        before = spread(table.double()).to(table.dtype) if every is None else every
        every = before + layer.everywhere(inputs, before, chunks, parts)
    raise AssertionError("a model has at least one layer")


def in_chunks(tokens: Tensor, rank: int) -> tuple[Tensor, int]:
    """tokens [b, t], padded behind to a whole number of chunks that suit the rank, and that number."""
    t = tokens.shape[1]
    chunks = -(-t * rank // ROWS_PER_CHUNK)
    return F.pad(tokens, (0, -t % chunks)), chunks


class Product(Function):
    """rows [m, s, d] @ weight [m, d, c]; the weight's gradient as sums over `parts` parts of the rows, side by side: a matrix
    of 64 x 128 summed over 20,000 rows keeps one multiprocessor of a GPU busy, not all."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, parts: int) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.parts = parts
        return rows @ weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight = ctx.saved_tensors
        cut = (ctx.parts, rows.shape[1] // ctx.parts)
        sums = rows.unflatten(1, cut).mT @ grad.unflatten(1, cut)
        return grad @ weight.mT, sums.sum(1), None


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


class _Inputs(NamedTuple):
    """x [m, b, h, t, r, p]; B [m, b, 1, t, r, n], without bias; log_alpha, w, gamma [m, b, h, t]; phi [m, b, h, t, a]."""

    x: Tensor
    B: Tensor
    log_alpha: Tensor
    w: Tensor
    gamma: Tensor
    phi: Tensor


def _normed(v: Tensor, weight: Tensor, eps: float) -> Tensor:
    """v [m, ..., c] / rms(v) * weight [m, c]."""
    y = F.rms_norm(v, v.shape[-1:], eps=eps)
    return y * weight.view(-1, *(1,) * (v.ndim - 2), weight.shape[-1])


class _Layer:
    """One layer of all models; weights [m, ...] by the names of `mamba3.lm.model.Block`."""

    def __init__(self, sizes: Sizes, which: Switches, weights: dict[str, Tensor]):
        self.sizes, self.which, self.weights = sizes, which, weights
        h, p, n, r = sizes.heads, sizes.p, sizes.n, sizes.r
        rows = weights["mixer.in_proj.weight"].split([h * p, h * p, r * n, r * n, 3 * h + sizes.pairs], dim=1)
        self.z, self.x, self.B, self.C, self.coefficients = (v.mT for v in rows)

    def _w(self, name: str) -> Tensor:
        return self.weights[f"mixer.{name}"]

    def inputs(self, source: Tensor, spread, parts: int = 1) -> _Inputs:
        """From rows [m, s, d] of the residual stream; spread: [m, s, c] to [m, b, t, c]; parts divide s."""
        z, which = self.sizes, self.which
        u = _normed(source, self.weights["norm.weight"], z.eps)
        x = spread(Product.apply(u, self.x, parts)).unflatten(-1, (z.heads, 1, z.p)).permute(0, 1, 3, 2, 4, 5)
        if z.r > 1:
            x = x * self._w("mimo_x")[:, None, :, None]
        B = spread(
            _normed(Product.apply(u, self.B, parts).unflatten(-1, (z.r, z.n)), self._w("B_norm.weight"), z.eps).flatten(
                2
            )
        )
        raw = spread(Product.apply(u.double(), self.coefficients.double(), parts)).to(u.dtype).movedim(-1, 2)
        dt, A, lam, theta = raw.split([z.heads, z.heads, z.heads, z.pairs], dim=2)  # [m, b, h or a, t]

        def switch(v: Tensor) -> Tensor:
            return v.view(-1, 1, 1, 1)

        dt = F.softplus(dt + self._w("dt_bias")[:, None, :, None])
        A = -torch.where(switch(which.heavy) > 0, heavy_tail(A), F.softplus(A)).clamp(min=z.A_floor)
        lam = torch.where(switch(which.fixed) > 0, switch(which.lam), lam.sigmoid())
        c = discretize(dt, A, lam)
        w = c.gamma + F.pad(c.halo[..., 1:], (0, 1))
        frequencies = 10000.0 ** -(torch.arange(z.pairs, device=dt.device, dtype=dt.dtype) / max(z.pairs, 1))
        turn = (math.pi * theta.tanh()).mT.unsqueeze(2) * (dt * switch(which.turns)).unsqueeze(-1)
        turn = turn + frequencies * switch(which.rope).unsqueeze(-1)
        phi = wrap(turn.double().cumsum(3)).to(dt.dtype)
        return _Inputs(x, B.unflatten(-1, (1, z.r, z.n)).permute(0, 1, 3, 2, 4, 5), c.log_alpha, w, c.gamma, phi)

    def _rotated(self, v: Tensor, bias: Tensor, phi: Tensor) -> Tensor:
        """v [m, b, 1, t, r, n] with bias [m, h, r, n], turned by phi [m, b, h, t, a]."""
        return rotate_pairs(v + bias[:, None, :, None], phi.cos().unsqueeze(-2), phi.sin().unsqueeze(-2))

    def _query(self, rows: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
        """z [m, s, h p] and normed C [m, s, r, n] from rows [m, s, d] of the residual stream."""
        u = _normed(rows, self.weights["norm.weight"], self.sizes.eps)
        C = Product.apply(u, self.C, parts).unflatten(-1, (self.sizes.r, self.sizes.n))
        return Product.apply(u, self.z, parts), _normed(C, self._w("C_norm.weight"), self.sizes.eps)

    def everywhere(self, inp: _Inputs, before: Tensor, chunks: int, parts: int) -> Tensor:
        """What the layer adds to `before` [m, b, t, d], at every token; `chunks` divides t."""
        r, chunk = self.sizes.r, before.shape[2] // chunks
        z, C = self._query(before.flatten(1, 2), parts)
        C = C.unflatten(1, before.shape[1:3]).unsqueeze(2)

        def cut(v: Tensor) -> Tensor:  # [m, b, h, t, ...] to [m, b, h, k, l, ...]
            return v.unflatten(3, (chunks, chunk))

        x = cut(inp.x).flatten(4, 5)
        B = cut(self._rotated(inp.B, self._w("B_bias"), inp.phi)).flatten(4, 5)
        C = cut(self._rotated(C, self._w("C_bias"), inp.phi)).flatten(4, 5)
        w, gamma, sums = cut(inp.w), cut(inp.gamma), cut(inp.log_alpha.double()).cumsum(-1).to(x.dtype)
        scores = C @ B.mT
        if r == 1:
            scores = Weighted.apply(scores, sums, sums - w.clamp(min=SMALLEST_WEIGHT).log(), gamma)
        else:
            weights = between(sums, w, gamma)[..., :, None, :, None]
            scores = (scores.unflatten(-1, (chunk, r)).unflatten(-3, (chunk, r)) * weights).flatten(-2).flatten(-3, -2)
        y = scores @ x
        if chunks > 1:
            y = y + self._from_earlier_chunks(x, B, C, w, sums)
        y = y.unflatten(4, (chunk, r)).flatten(3, 4) + self._w("D")[:, None, :, None, None, None] * inp.x
        y = self._gated(y.permute(0, 1, 3, 2, 4, 5), z.unflatten(1, before.shape[1:3]))
        out = Product.apply(y.flatten(3).flatten(1, 2), self._w("out_proj.weight").mT, parts)
        return out.unflatten(1, before.shape[1:3])

    def _from_earlier_chunks(self, x: Tensor, B: Tensor, C: Tensor, w: Tensor, sums: Tensor) -> Tensor:
        """What the state that enters each chunk adds to y, [m, b, h, k, l r, p]."""
        r, last = self.sizes.r, sums[..., -1:]
        out = ((last - sums).exp() * w).repeat_interleave(r, -1)
        local, total = B.mT @ (x * out.unsqueeze(-1)), last.exp().unsqueeze(-1)
        S, entering = torch.zeros_like(local[:, :, :, 0]), []
        for j in range(x.shape[3]):
            entering.append(S)
            S = torch.addcmul(local[:, :, :, j], S, total[:, :, :, j])
        into = sums.exp().repeat_interleave(r, -1)
        return (C @ torch.stack(entering, 3)) * into.unsqueeze(-1)

    def at(self, inp: _Inputs, before: Tensor, positions: Tensor) -> Tensor:
        """`before` [m, b, d], the stream at the asked token, plus what the layer adds there."""
        m, b = before.shape[:2]

        def pick(v: Tensor) -> Tensor:  # [m, b, h, t, ...] at the asked token, t = 1
            tail = v.shape[4:]
            return v.gather(3, positions.view(1, b, 1, 1, *(1,) * len(tail)).expand(m, b, v.shape[2], 1, *tail))

        z, C = self._query(before)
        C = self._rotated(C[:, :, None, None], self._w("C_bias"), pick(inp.phi))  # [m, b, h, 1, r, n]
        B = self._rotated(inp.B, self._w("B_bias"), inp.phi)  # [m, b, h, t, s, n]
        sums = inp.log_alpha.double().cumsum(3)
        i = torch.arange(inp.w.shape[3], device=z.device)
        earlier, same = (i < positions[:, None])[None, :, None], (i == positions[:, None])[None, :, None]
        weights = (pick(sums) - sums).masked_fill(~earlier, -torch.inf).to(z.dtype).exp() * inp.w
        weights = torch.where(same, inp.gamma, weights)
        if self.sizes.r == 1:
            scores = (C * B).sum(-1, keepdim=True) * weights[..., None, None]
            y = (scores * inp.x).sum(3)
        else:
            scores = torch.einsum("mbhrn,mbhtsn->mbhtrs", C.squeeze(3), B) * weights[..., None, None]
            y = torch.einsum("mbhtrs,mbhtsp->mbhrp", scores, inp.x)
        y = y + self._w("D")[:, None, :, None, None] * pick(inp.x).squeeze(3)
        y = self._gated(y.unsqueeze(2), z.unsqueeze(2))
        return before + y.flatten(2) @ self._w("out_proj.weight").mT

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """y [m, b, t, h, r, p] and z [m, b, t, h p] to [m, b, t, h, p]."""
        z = z.unflatten(-1, (self.sizes.heads, 1, self.sizes.p))
        if self.sizes.r == 1:
            return (y * F.silu(z)).squeeze(-2)
        y = y * F.silu(z * self._w("mimo_z")[:, None, None])
        return (y * self._w("mimo_o")[:, None, None]).sum(-2)
