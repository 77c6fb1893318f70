"""Many models of one shape as one computation, where every sequence asks for one answer.

    logits [m, b, v] = head(norm(h at the asked token)),        parameters [m, ...] of m models, tokens [b, t] shared by all

The models' axis leads every product, so nothing goes through torch.vmap. Exact savings, as one position is asked: the first
layer projects the vocabulary's rows and spreads them over the tokens, the last one reads out, gates and projects one token.
Settings that are values of one equation (rotation, lam, biases, decay) are switches of a model: different rows of Table 5b
train in one stack. Law: the logits of `Stack`, to rounding.

What goes into the angles (dt, A, lam, theta) is projected without the matrix units' short float32 (TF32), which, where the
caller allows it, touches amplitudes only; sums along the sequence are float64, or integers of 32 bits a turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mamba3.tasks.mixing import Rows, mix, mix_at
from mamba3.tasks.widened import Sizes, Switches

ROWS_PER_CHUNK = 256  # tokens times ranks whose scores are one matrix
PARTS = 32  # of the rows, at most, in a gradient's sum


class Mixers(NamedTuple):
    """What the layers' work between their projections is done by; where `at` is None, the last layer is worked out at every
    token and read at one."""

    everywhere: Callable[..., Tensor]
    at: Callable[..., Tensor] | None


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
        queries = not final or mixers.at is None
        if every is None:
            h = table[:, last]
            rows = project(sizes, layer, table, 1, queries=queries)
            rows = Rows(*(None if v is None else spread(v) for v in rows))
        else:
            h = _at(every, positions)
            rows = project(sizes, layer, every.flatten(1, 2), parts, queries=queries)
            rows = Rows(*(None if v is None else v.unflatten(1, (b, t)) for v in rows))
        out = layer["mixer.out_proj.weight"].mT
        if final:
            if mixers.at is None:
                y = _at(mixers.everywhere(sizes, which, layer, rows, chunks), positions)
            else:
                asked = project(sizes, layer, h, 1, keys=False)
                y = mixers.at(sizes, which, layer, rows._replace(z=asked.z, C=asked.C), positions)
            h = h + y @ out
            return (_normed(h, parameters["norm_f.weight"], sizes.eps) @ table.mT)[..., : sizes.answers]
        y = mixers.everywhere(sizes, which, layer, rows, chunks)
        before = spread(table) if every is None else every
        every = before + Product.apply(y.flatten(1, 2), out, parts, False).unflatten(1, (b, t))
    raise AssertionError("a model has at least one layer")


def _at(v: Tensor, positions: Tensor) -> Tensor:
    """v [m, b, t, c] at the asked tokens, [m, b, c]."""
    m, b, _, c = v.shape
    return v.gather(2, positions.view(1, b, 1, 1).expand(m, b, 1, c)).squeeze(2)


def in_chunks(tokens: Tensor, rank: int) -> tuple[Tensor, int]:
    """tokens [b, t], padded behind to a whole number of chunks that suit the rank, and that number."""
    t = tokens.shape[1]
    chunks = -(-t * rank // ROWS_PER_CHUNK)
    return F.pad(tokens, (0, -t % chunks)), chunks


@contextmanager
def _precision(exact: bool) -> Iterator[None]:
    """Full float32 where `exact`, else what the caller has set."""
    before = torch.get_float32_matmul_precision()
    if exact and before != "highest":
        torch.set_float32_matmul_precision("highest")
        yield
        torch.set_float32_matmul_precision(before)
    else:
        yield


class Product(Function):
    """rows [m, s, d] @ weight [m, d, c]; the weight's gradient as sums over `parts` parts of the rows, side by side: a matrix
    of 64 x 128 summed over 20,000 rows keeps one multiprocessor of a GPU busy, not all. exact: float32 is not shortened."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, parts: int, exact: bool) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.parts, ctx.exact = parts, exact
        with _precision(exact):
            return rows @ weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight = ctx.saved_tensors
        cut = (ctx.parts, rows.shape[1] // ctx.parts)
        with _precision(ctx.exact):
            sums = rows.unflatten(1, cut).mT @ grad.unflatten(1, cut)
            return grad @ weight.mT, sums.sum(1), None, None


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
    # The norm's weight is multiplied into the projections: a pass over all rows less, and no sum over them for its gradient.
    u, scale = F.rms_norm(source, source.shape[-1:], eps=sizes.eps), layer["norm.weight"].unsqueeze(2)
    z = x = B = C = raw = None

    def product(weight: Tensor, exact: bool = False) -> Tensor:
        return Product.apply(u, scale * weight, parts, exact)

    def normed(v: Tensor, name: str) -> Tensor:
        return _normed(v.unflatten(-1, (r, n)), layer[f"mixer.{name}.weight"], sizes.eps).flatten(-2)

    if keys:
        x, B, raw = product(wx), normed(product(wB), "B_norm"), product(angles, exact=True)
    if queries:
        z, C = product(wz), normed(product(wC), "C_norm")
    return Rows(z, x, B, C, raw)
