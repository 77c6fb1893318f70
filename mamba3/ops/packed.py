"""Sequences cut into chunks: one table serves dense and packed inputs.

Chunk j of every sequence that is at least j chunks long is worked on together, longest sequence first, so that the
sequences still running are always a prefix of those before. A dense batch is the case where all have the same length.
No chunk straddles two sequences; the rows that fill up a sequence's last chunk have all coefficients zero, which makes
them steps that change nothing (alpha = 1, gamma = halo = 0, no rotation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """The table: how tokens lie in chunks of `length` rows.

    running[j]: how many sequences have a chunk j. tokens: tokens a sequence (dense) or in the pack.
    Packed only: order [s] lists sequences longest first; rows [k, l] is the token of each chunk row, clamped to the
    sequence's last; filled [k, l] is False where a row fills up; slots [t] is where each token went.
    """

    length: int
    running: tuple[int, ...]
    tokens: int
    order: Tensor | None = None
    rows: Tensor | None = None
    filled: Tensor | None = None
    slots: Tensor | None = None
    last: Tensor | None = None

    def blocks(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Ranges (j0, j1, sequences) of chunk ranks with the same sequences running, of about `rows` rows each."""
        start = 0
        while start < len(self.running):
            n = self.running[start]
            stop = min(start + max(1, rows // (n * self.length)), len(self.running))
            while self.running[stop - 1] != n:
                stop -= 1
            yield start, stop, n
            start = stop

    def take(self, v: Tensor, start: int, stop: int) -> Tensor:
        """Rows of chunk ranks start..stop of v [b, t, ...] as [k, l, ...]; what fills up repeats or is zero."""
        if self.rows is not None:
            first, last = sum(self.running[:start]), sum(self.running[:stop])
            rows = self.rows[first:last]
            return v[0].index_select(0, rows.reshape(-1)).unflatten(0, rows.shape)
        span = v[:, start * self.length : stop * self.length]
        missing = (stop - start) * self.length - span.shape[1]
        if missing:
            span = F.pad(span, (0, 0) * (v.ndim - 2) + (0, missing))
        return span.unflatten(1, (stop - start, self.length)).transpose(0, 1).flatten(0, 1)

    def take_coefficient(self, v: Tensor, start: int, stop: int) -> Tensor:
        """`take` of a coefficient: zero where a row fills up."""
        taken = self.take(v, start, stop)
        if self.filled is None:
            return taken
        first, last = sum(self.running[:start]), sum(self.running[:stop])
        return torch.where(self.filled[first:last].unsqueeze(-1), taken, 0)

    def put(self, blocks: list[Tensor]) -> Tensor:
        """The inverse of `take` over all blocks: [k, l, ...] pieces to [b, t, ...]."""
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        if self.slots is not None:
            return y.flatten(0, 1).index_select(0, self.slots).unsqueeze(0)
        y = y.unflatten(0, (len(self.running), self.running[0])).transpose(0, 1).flatten(1, 2)
        return y[:, : self.tokens]

    def next_halo(self, halo: Tensor) -> Tensor:
        """halo [b, t, h] of the token that follows each one in its sequence; zero for the last."""
        following = F.pad(halo[:, 1:], (0, 0, 0, 1))
        return following if self.last is None else following.index_fill(1, self.last, 0)

    def last_token(self, v: Tensor) -> Tensor:
        """v [b, t, ...] at the last token of each sequence, in the caller's order: [s, ...]."""
        return v[:, -1] if self.last is None else v[0].index_select(0, self.last)

    def first_token(self, v: Tensor) -> Tensor:
        """v [b, t, ...] at the first token of each sequence, in the caller's order: [s, ...]."""
        if self.last is None:
            return v[:, 0]
        return v[0].index_select(0, F.pad(self.last[:-1] + 1, (1, 0)))


def dense(batch: int, tokens: int, length: int) -> Chunks:
    """The table of `batch` sequences of `tokens` tokens each."""
    return Chunks(length=length, running=(batch,) * -(-tokens // length), tokens=tokens)


def packed(cu_seqlens: list[int], length: int, device: torch.device) -> Chunks:
    """The table of sequences that lie one after another; cu_seqlens as in `mamba3.ops.scan`."""
    cu = torch.tensor(cu_seqlens)
    lengths = cu.diff()
    counts = (lengths + length - 1) // length
    order = torch.argsort(lengths, descending=True, stable=True)
    counts_sorted = counts[order]
    running = tuple(int((counts_sorted > j).sum()) for j in range(int(counts_sorted[0])))
    rank = torch.repeat_interleave(torch.arange(len(running)), torch.tensor(running))
    sequence = torch.cat([order[:n] for n in running])
    offset = rank.unsqueeze(1) * length + torch.arange(length)
    filled = offset < lengths[sequence].unsqueeze(1)
    rows = cu[sequence].unsqueeze(1) + torch.minimum(offset, lengths[sequence].unsqueeze(1) - 1)
    slots = torch.empty(cu_seqlens[-1], dtype=torch.long)
    slots[rows[filled]] = torch.arange(rows.numel()).view_as(rows)[filled]
    on_device = {
        name: value.to(device)
        for name, value in dict(order=order, rows=rows, filled=filled, slots=slots, last=cu[1:] - 1).items()
    }
    return Chunks(length=length, running=running, tokens=cu_seqlens[-1], **on_device)
