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
from collections.abc import Callable
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


class Mixers(NamedTuple):
    """What the layers' work between their projections is done by; `torch.compile` of each is another choice."""

    everywhere: Callable[..., Tensor]
    at: Callable[..., Tensor]


def answer_logits(
    sizes: Sizes, which: Switches, parameters: dict[str, Tensor], tokens: Tensor, positions: Tensor, chunks: int = 1,
    mixers: Mixers | None = None,
) -> Tensor:  # fmt: skip
    """Logits [m, b, v] at position `positions` [b] of the sequences `tokens` [b, t]; parameters as `widened`, [m, ...].

    The tokens are worked on in `chunks` parts of equal length; the scores of each are one matrix.
    """
    mixers = mixers or Mixers(mix, mix_at)
    b, t = tokens.shape
    table, parts = parameters["embedding.weight"], math.gcd(PARTS, b)
    one_hot = tokens.unsqueeze(-1) == torch.arange(sizes.vocab, device=tokens.device)
    one_hot, flat = one_hot.view(parts, b // parts * t, sizes.vocab).to(table.dtype), tokens.flatten()
    last = tokens.gather(1, positions.unsqueeze(1)).squeeze(1)

    def spread(v: Tensor) -> Tensor:  # [m, vocabulary, c] to [m, b, t, c]
        return Spread.apply(v, flat, one_hot).unflatten(1, (b, t))

    every = None  # the residual stream at every token; the first layer needs only the table
    for i in range(sizes.layers):
        own = f"layers.{i}."
        layer = {k.removeprefix(own): v for k, v in parameters.items() if k.startswith(own)}
        final = i == sizes.layers - 1
        if every is None:
            h = table[:, last]
            rows = project(sizes, layer, table, 1, queries=not final)
            rows = Rows(*(None if v is None else spread(v) for v in rows))
        else:
            h = every.gather(2, positions.view(1, b, 1, 1).expand(every.shape[0], b, 1, every.shape[3])).squeeze(2)
            rows = project(sizes, layer, every.flatten(1, 2), parts, queries=not final)
            rows = Rows(*(None if v is None else v.unflatten(1, (b, t)) for v in rows))
        out = layer["mixer.out_proj.weight"].mT
        if final:
            asked = project(sizes, layer, h, 1, keys=False)
            h = h + mixers.at(sizes, which, layer, rows._replace(z=asked.z, C=asked.C), positions) @ out
            return (_normed(h, parameters["norm_f.weight"], sizes.eps) @ table.mT)[..., : sizes.answers]
        y = mixers.everywhere(sizes, which, layer, rows, chunks)
        before = spread(table) if every is None else every
        every = before + Product.apply(y.flatten(1, 2), out, parts).unflatten(1, (b, t))
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


class Spread(Function):
    """table [m, v, c] at tokens [s], [m, s, c]; the gradient as products with one_hot [parts, s / parts, v], then a sum."""

    @staticmethod
    def forward(ctx, table: Tensor, tokens: Tensor, one_hot: Tensor) -> Tensor:
        ctx.save_for_backward(one_hot)
        return table.index_select(1, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (one_hot,) = ctx.saved_tensors
        return (one_hot.mT @ grad.unflatten(1, one_hot.shape[:2])).sum(1), None, None


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


class Rows(NamedTuple):
    """What a layer projects, of each row of the residual stream: z, x [m, ..., h p], normed B, C [m, ..., r n], raw
    [m, ..., 3 h + a], that is dt, A, lambda, theta."""

    z: Tensor | None
    x: Tensor | None
    B: Tensor | None
    C: Tensor | None
    raw: Tensor | None


def _normed(v: Tensor, weight: Tensor, eps: float) -> Tensor:
    """v [m, ..., c] / rms(v) * weight [m, c]."""
    y = F.rms_norm(v, v.shape[-1:], eps=eps)
    return y * weight.view(-1, *(1,) * (v.ndim - 2), weight.shape[-1])


def project(
    sizes: Sizes, layer: dict[str, Tensor], source: Tensor, parts: int, *, keys: bool = True, queries: bool = True
) -> Rows:
    """Of rows [m, s, d] of the residual stream: x, B and raw if `keys`, z and C if `queries`. parts divide s."""
    h, p, n, r = sizes.heads, sizes.p, sizes.n, sizes.r
    cut = (h * p, h * p, r * n, r * n, 3 * h + sizes.pairs)
    wz, wx, wB, wC, angles = (v.mT for v in layer["mixer.in_proj.weight"].split(cut, dim=1))
    u = _normed(source, layer["norm.weight"], sizes.eps)
    z = x = B = C = raw = None

    def normed(v: Tensor, name: str) -> Tensor:
        return _normed(v.unflatten(-1, (r, n)), layer[f"mixer.{name}.weight"], sizes.eps).flatten(-2)

    if keys:
        x, B = Product.apply(u, wx, parts), normed(Product.apply(u, wB, parts), "B_norm")
        raw = Product.apply(u.double(), angles.double(), parts).to(u.dtype)
    if queries:
        z, C = Product.apply(u, wz, parts), normed(Product.apply(u, wC, parts), "C_norm")
    return Rows(z, x, B, C, raw)


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


def _keys(sizes: Sizes, which: Switches, layer: dict[str, Tensor], rows: Rows) -> _Keys:
    """Every nonlinearity of the coefficients, the angles, B with bias and turned."""
    assert rows.x is not None and rows.B is not None and rows.raw is not None
    x = rows.x.unflatten(-1, (sizes.heads, 1, sizes.p)).permute(0, 1, 3, 2, 4, 5)
    if sizes.r > 1:
        x = x * layer["mixer.mimo_x"][:, None, :, None]
    dt, A, lam, theta = rows.raw.movedim(-1, 2).split([sizes.heads, sizes.heads, sizes.heads, sizes.pairs], dim=2)
    dt = F.softplus(dt + layer["mixer.dt_bias"][:, None, :, None])
    A = -torch.where(_switch(which.heavy) > 0, heavy_tail(A), F.softplus(A)).clamp(min=sizes.A_floor)
    lam = torch.where(_switch(which.fixed) > 0, _switch(which.lam), lam.sigmoid())
    c = discretize(dt, A, lam)
    w = c.gamma + F.pad(c.halo[..., 1:], (0, 1))
    frequencies = 10000.0 ** -(torch.arange(sizes.pairs, device=dt.device, dtype=dt.dtype) / max(sizes.pairs, 1))
    turn = (math.pi * theta.tanh()).mT.unsqueeze(2) * (dt * _switch(which.turns)).unsqueeze(-1)
    turn = turn + frequencies * _switch(which.rope).unsqueeze(-1)
    phi = wrap(turn.double().cumsum(3)).to(dt.dtype)
    return _Keys(x, _turned(sizes, rows.B, layer["mixer.B_bias"], phi), c.log_alpha, w, c.gamma, phi)


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
