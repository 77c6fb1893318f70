"""Causal grouped-query attention without positions (NoPE), for hybrid models, with a cache that grows.

    y = out_proj(softmax(q k^T / sqrt(head_dim)) v),    [q | k | v] = in_proj(u)

The three verbs of every layer: forward, prefill, step. The cache is the layer's state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.ops.validation import check_cu_seqlens

PAGE = 64


def whole_pages(tokens: int) -> int:
    """The least multiple of PAGE that holds so many tokens."""
    return -(-tokens // PAGE) * PAGE


class AttentionState(NamedTuple):
    """Keys and values read so far: k, v [b, capacity, n_kv_heads, head_dim]; length [b] int64, how many are valid.

    used is the longest length, known without asking the device.
    """

    k: Tensor
    v: Tensor
    length: Tensor
    used: int

    def _map(self, f) -> AttentionState:
        return AttentionState(f(self.k), f(self.v), f(self.length), self.used)

    def select(self, index: Tensor | Iterable[int]) -> AttentionState:
        """The caches of some sequences, in the order given."""
        index = torch.as_tensor(index, device=self.k.device)
        return self._map(lambda v: v.index_select(0, index))

    def trim(self, used: int) -> AttentionState:
        """The same caches when the longest is known to be `used`, in no more pages than that takes."""
        pages = whole_pages(used)
        k, v = (w[:, :pages].clone() if w.shape[1] > pages else w for w in (self.k, self.v))
        return AttentionState(k, v, self.length, used)

    @staticmethod
    def cat(states: Sequence[AttentionState]) -> AttentionState:
        """The caches of several sequences, in order, with room for the longest. A copy."""
        used = max(s.used for s in states)
        k, v = (torch.cat([getattr(s.grow(used), name)[:, :used] for s in states]) for name in ("k", "v"))
        return AttentionState(k, v, torch.cat([s.length for s in states]), used)

    def detach(self) -> AttentionState:
        """The same tensors, cut off from the graph that made them."""
        return self._map(Tensor.detach)

    def clone(self) -> AttentionState:
        """A copy that shares no memory with this one."""
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> AttentionState:
        """The same cache on another device."""
        return self._map(lambda v: v.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return self.k.nbytes + self.v.nbytes + self.length.nbytes

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What a state file holds: the valid part."""
        return {
            prefix + "k": self.k[:, : self.used], prefix + "v": self.v[:, : self.used], prefix + "length": self.length
        }  # fmt: skip

    def grow(self, needed: int) -> AttentionState:
        """The same cache with room for `needed` tokens; doubling, so that appending costs a constant on average.

        Whole pages: sums over a cache then have no ragged end, and their rounding does not depend on the room that is left.
        """
        capacity = self.k.shape[1]
        if needed <= capacity:
            return self
        extra = whole_pages(max(needed, 2 * capacity)) - capacity
        return self._replace(k=F.pad(self.k, (0, 0) * 2 + (0, extra)), v=F.pad(self.v, (0, 0) * 2 + (0, extra)))


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
        after = _append(grown, k, v)
        return self._out(_attend(q, after.k, after.v, _mask(state.length, u.shape[1], after.k.shape[1]))), after

    def prefill_last(self, u: Tensor, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        """`prefill` where y of the last token is all that is wanted: (y [b, 1, d_model], the cache)."""
        y, after = self.prefill(u, state)
        return y[:, -1:], after

    def step(self, u: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """One token: u [b, d_model] to (y, the cache with it appended, in place where it had room)."""
        q, k, v = self._project(u.unsqueeze(1))
        grown = state.grow(state.used + 1)
        if torch.is_grad_enabled():
            grown = grown.clone()
        before = grown.length.clone()
        after = _append(grown, k, v)
        return self._out(_attend(q, after.k, after.v, _mask(before, 1, after.k.shape[1]))).squeeze(1), after

    def verify(self, u: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """`prefill` of tokens [b, t] of which the last ones may be taken back: y, and the state itself.

        They are written behind what the cache holds, which must have room for them, and do not count yet: see `accept`.
        """
        q, k, v = self._project(u)
        before, tokens = state.length.clone(), u.shape[1]
        if state.used + tokens > state.k.shape[1]:
            raise ValueError(f"The cache has {state.k.shape[1]} places, and {state.used + tokens} are needed; grow it.")
        _append(state._replace(length=before.clone()), k, v)
        return self._out(_attend(q, state.k, state.v, _mask(before, tokens, state.k.shape[1]))), state

    def accept(self, read: AttentionState, state: AttentionState, rows: list[int], count: int) -> None:
        """Let the first `count` of the tokens that `verify` read count, in some rows."""
        state.length[torch.tensor(rows, device=state.length.device)] += count

    def _prefill_packed(self, u: Tensor, state: AttentionState, cu_seqlens: list[int]) -> tuple[Tensor, AttentionState]:
        lengths = [b - a for a, b in itertools.pairwise(cu_seqlens)]
        ys, states = [], []
        for i, piece in enumerate(u.split(lengths, dim=1)):
            y, after = self.prefill(piece, state.select([i]))
            ys.append(y)
            states.append(after)
        return torch.cat(ys, dim=1), AttentionState.cat(states)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if u.shape[-1] != self.d_model or u.ndim != 3:
            raise ValueError(f"u must be [b, t, d_model] with d_model = {self.d_model}; it came with {tuple(u.shape)}.")
        heads = self.in_proj(u).unflatten(-1, (-1, self.head_dim))
        return heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)

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


def _append(state: AttentionState, k: Tensor, v: Tensor) -> AttentionState:
    """Write k, v [b, t, ...] behind what each sequence holds; the tensors of `state` are changed."""
    tokens = k.shape[1]
    at = state.length[:, None] + torch.arange(tokens, device=k.device)
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    state.k[rows, at] = k.to(state.k.dtype)
    state.v[rows, at] = v.to(state.v.dtype)
    return state._replace(length=state.length.add_(tokens), used=state.used + tokens)
