"""Causal grouped-query attention without positions (NoPE), for hybrid models, with a cache that grows.

    y = out_proj(softmax(q k^T / sqrt(head_dim)) v),    [q | k | v] = in_proj(u)

The three verbs of every layer: forward, prefill, step. The cache is the layer's state.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.nn.cache import AttentionState, Cache
from mamba3.ops.validation import check_cu_seqlens


class Attention(nn.Module):
    """Causal self-attention: [b, t, d_model] to [b, t, d_model].

    n_kv_heads must divide n_heads; head_dim defaults to d_model / n_heads. bias: of both projections.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        n_kv_heads = n_kv_heads or n_heads
        if n_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_heads = {n_heads} must be a positive multiple of n_kv_heads = {n_kv_heads}.")
        if head_dim is None and d_model % n_heads:
            raise ValueError(
                f"d_model = {d_model} must be a multiple of n_heads = {n_heads}, or head_dim must be given."
            )
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.head_dim = head_dim or d_model // n_heads
        width = (n_heads + 2 * n_kv_heads) * self.head_dim
        self.in_proj = nn.Linear(d_model, width, bias=qkv_bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=out_bias, device=device, dtype=dtype)

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """An empty cache."""
        device, dtype = device or self.in_proj.weight.device, dtype or self.in_proj.weight.dtype
        empty = torch.zeros(batch_size, 0, self.n_kv_heads, self.head_dim, device=device, dtype=dtype)
        return AttentionState(empty, empty.clone(), torch.zeros(batch_size, device=device, dtype=torch.int64), 0)

    def forward(self, u: Tensor, cu_seqlens: Tensor | list[int] | None = None) -> Tensor:
        """u [b, t, d_model] to the same shape; with cu_seqlens no sequence of the pack sees another."""
        q, k, v = self._project(u)
        if cu_seqlens is None:
            return self._out(_attend(q, k, v, None))
        cu_seqlens = check_cu_seqlens(cu_seqlens, u.shape[0], u.shape[1])
        spans = [slice(a, b) for a, b in itertools.pairwise(cu_seqlens)]
        return self._out(torch.cat([_attend(q[:, s], k[:, s], v[:, s], None) for s in spans], dim=1))

    def prefill(
        self, u: Tensor, state: AttentionState | None = None, cu_seqlens: Tensor | list[int] | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Any number of tokens after any cache: (y, the cache with them appended). The given cache is not changed."""
        if cu_seqlens is not None:
            cu_seqlens = check_cu_seqlens(cu_seqlens, u.shape[0], u.shape[1])
            return self._prefill_packed(u, state or self.init_state(len(cu_seqlens) - 1, u.device, u.dtype), cu_seqlens)
        state = state or self.init_state(u.shape[0], u.device, u.dtype)
        q, k, v = self._project(u)
        if state.used == 0:
            after = AttentionState(k, v, state.length + u.shape[1], u.shape[1])
            return self._out(_attend(q, k, v, None)), after
        grown = state.grow(state.used + u.shape[1]).clone()
        after = grown.append(k, v)
        return self._out(_attend(q, after.k, after.v, _mask(state.length, u.shape[1], after.k.shape[1]))), after

    def prefill_last(self, u: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        """`prefill` where y of the last token is all that is wanted: (y [b, 1, d_model], the cache)."""
        y, after = self.prefill(u, state)
        return y[:, -1:], after

    def step(self, u: Tensor, state: Cache, live: Tensor | None = None) -> tuple[Tensor, Cache]:
        """One token: u [b, d_model] to (y, the cache with it appended, in place where it had room).

        live [1] int32: of the sequences the first so many; the others are padding, whose y means nothing and whose cache
        does not count what is written behind it.
        """
        self._check_input(u, 2)
        return self.step_row(self.in_proj(u), state, live)

    def step_row(self, row: Tensor, state: Cache, live: Tensor | None = None) -> tuple[Tensor, Cache]:
        """`step` from what in_proj gives, [b, projected]."""
        q, k, v = self._heads(row.unsqueeze(1))
        grown = state.grow(state.used + 1)
        if torch.is_grad_enabled():
            grown = grown.clone()
        before = grown.length.clone()
        after = grown.append(k, v)
        if live is not None:
            after.length.copy_(before + (torch.arange(len(before), device=before.device) < live))
        keys, values = after.rows()
        return self._out(_attend(q, keys, values, _mask(before, 1, keys.shape[1]))).squeeze(1), after

    def verify(self, u: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        """`prefill` of tokens [b, t] of which the last ones may be taken back: y, and the state itself.

        They are written behind what the cache holds, which must have room for them, and do not count yet: see `accept`.
        """
        q, k, v = self._project(u)
        before, tokens = state.length.clone(), u.shape[1]
        if state.used + tokens > state.capacity:
            raise ValueError(f"The cache has {state.capacity} places, and {state.used + tokens} are needed; grow it.")
        state._replace(length=before.clone()).append(k, v)
        keys, values = state.rows()
        return self._out(_attend(q, keys, values, _mask(before, tokens, keys.shape[1]))), state

    def accept(self, read: Cache, state: Cache, counts: Tensor) -> None:
        """Let the first counts[i] of the tokens that `verify` read of each sequence i count."""
        state.length.add_(counts)

    def _prefill_packed(self, u: Tensor, state: AttentionState, cu_seqlens: list[int]) -> tuple[Tensor, AttentionState]:
        lengths = [b - a for a, b in itertools.pairwise(cu_seqlens)]
        ys, states = [], []
        for i, piece in enumerate(u.split(lengths, dim=1)):
            y, after = self.prefill(piece, state.select([i]))
            ys.append(y)
            states.append(after)
        return torch.cat(ys, dim=1), AttentionState.cat(states)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check_input(u, 3)
        return self._heads(self.in_proj(u))

    def _check_input(self, u: Tensor, dimensions: int) -> None:
        letters = "[b, t, d_model]" if dimensions == 3 else "[b, d_model]"
        if u.shape[-1] != self.d_model or u.ndim != dimensions:
            raise ValueError(f"u must be {letters} with d_model = {self.d_model}; it came with {tuple(u.shape)}.")

    def _heads(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = row.unflatten(-1, (-1, self.head_dim)).split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        return q, k, v

    def _out(self, y: Tensor) -> Tensor:
        return self.out_proj(y.flatten(-2))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [b, t, heads, e] over k, v [b, s, kv heads, e]; causal from position 0 when there is no mask."""
    q, k, v = (w.transpose(1, 2) for w in (q, k.to(q.dtype), v.to(q.dtype)))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)


def _mask(before: Tensor, tokens: int, capacity: int) -> Tensor:
    """[b, 1, t, capacity]: token i of a sequence that had `before` tokens sees the cache up to before + i."""
    last = before[:, None] + torch.arange(tokens, device=before.device)
    return (torch.arange(capacity, device=before.device) <= last[..., None]).unsqueeze(1)
