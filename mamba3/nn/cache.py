"""What attention keeps of the tokens it has read: keys and values in one piece, or in pages that lie anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

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

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.k.shape[1]

    def select(self, index: Tensor | Iterable[int]) -> AttentionState:
        """The caches of some sequences, in the order given."""
        index = torch.as_tensor(index, device=self.k.device)
        return self._map(lambda v: v.index_select(0, index))

    def part(self, rows: slice) -> AttentionState:
        """The caches of sequences that lie side by side, in this one's memory."""
        return self._map(lambda v: v[rows])

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

    def append(self, k: Tensor, v: Tensor) -> AttentionState:
        """Write k, v [b, t, ...] behind what each sequence holds; the tensors of this state are changed."""
        at = self.length[:, None] + torch.arange(k.shape[1], device=k.device)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[rows, at] = k.to(self.k.dtype)
        self.v[rows, at] = v.to(self.v.dtype)
        return self._replace(length=self.length.add_(k.shape[1]), used=self.used + k.shape[1])

    def rows(self) -> tuple[Tensor, Tensor]:
        """k, v of every place, [b, capacity, n_kv_heads, head_dim]."""
        return self.k, self.v


class PagedState(NamedTuple):
    """Keys and values in pages of PAGE tokens that lie anywhere: k, v [pages, PAGE, n_kv_heads, head_dim] of all sequences;
    table [b, width] int64, the pages of each in order, then zeros; length and used as in `AttentionState`.

    Page 0 is nobody's: where a table ends, and where sequences of padding write. Whatever lies behind a sequence's tokens must
    be finite: it is multiplied by 0. For `step` and `verify` without gradients; the pages are changed in place.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    length: Tensor
    used: int

    @property
    def capacity(self) -> int:
        """Tokens that a table has room for."""
        return self.table.shape[1] * PAGE

    def grow(self, needed: int) -> PagedState:
        """This state, if its tables have room. ValueError if not: pages are given out by whoever owns them."""
        if needed > self.capacity:
            raise ValueError(
                f"The table has room for {self.capacity} tokens, and {needed} are needed; add pages to it."
            )
        return self

    def clone(self) -> PagedState:
        raise ValueError("Pages are changed in place and have no copy; step under torch.no_grad().")

    def append(self, k: Tensor, v: Tensor) -> PagedState:
        """Write k, v [b, t, ...] behind what each sequence holds, in place."""
        at = self.length[:, None] + torch.arange(k.shape[1], device=k.device)
        page, place = self.table.gather(1, at // PAGE), at % PAGE
        self.k[page, place] = k.to(self.k.dtype)
        self.v[page, place] = v.to(self.v.dtype)
        return self._replace(length=self.length.add_(k.shape[1]), used=self.used + k.shape[1])

    def rows(self) -> tuple[Tensor, Tensor]:
        """A copy of k and v, [b, capacity, n_kv_heads, head_dim]."""
        return self.k[self.table].flatten(1, 2), self.v[self.table].flatten(1, 2)


Cache = TypeVar("Cache", AttentionState, PagedState)
