"""Sequences cut into chunks: one table serves dense and packed inputs.

Chunk j of every sequence that is at least j chunks long is worked on together, longest sequence first, so that the
sequences still running are always a prefix of those before. A dense batch is the case where all have the same length.
No chunk straddles two sequences; the rows that fill up a sequence's last chunk have all coefficients zero, which makes
them steps that change nothing (alpha = 1, gamma = halo = 0, no rotation).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """The table: how tokens lie in chunks of `length` rows.

    running[j]: how many sequences have a chunk j. tokens: tokens a sequence (dense) or in the pack.
    Packed only: order [s] lists sequences longest first; sequence [k] is that of each chunk; rows [k, l] is the token of
    each chunk row, clamped to the sequence's last; filled [k, l] is False where a row fills up; slots [t] is where each
    token went; last [s] is each sequence's last token.
    """

    length: int
    running: tuple[int, ...]
    tokens: int
    order: Tensor | None = None
    sequence: Tensor | None = None
    rows: Tensor | None = None
    filled: Tensor | None = None
    slots: Tensor | None = None
    last: Tensor | None = None

    def blocks(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Ranges (j0, j1, sequences) of chunk ranks with the same sequences running, of about `rows` rows each."""
        if torch.compiler.is_exporting() and self.order is None:  # one graph for every batch: its size is a symbol
            yield 0, len(self.running), self.running[0]
            return
        start = 0
        while start < len(self.running):
            n = self.running[start]
            stop = min(start + max(1, rows // (n * self.length)), len(self.running))
            while self.running[stop - 1] != n:
                stop -= 1
            yield start, stop, n
            start = stop

    def pieces(self, v: Tensor, blocks: list[tuple[int, int, int]]) -> list[Tensor]:
        """v [b, t, ...] in chunks, [k, l, ...] for each block; what fills up repeats the last token, or is zero.

        One split and no slices: the gradient of a slice is a tensor of the size of the whole.
        """
        if self.rows is not None:
            taken = v[0].index_select(0, self.rows.reshape(-1)).unflatten(0, self.rows.shape)
            return list(taken.split([(stop - start) * n for start, stop, n in blocks]))
        spans = list(
            v.split([min(stop * self.length, self.tokens) - start * self.length for start, stop, _ in blocks], dim=1)
        )
        missing = len(self.running) * self.length - self.tokens
        if missing:
            spans[-1] = F.pad(spans[-1], (0, 0) * (v.ndim - 2) + (0, missing))
        return [span.unflatten(1, (-1, self.length)).transpose(0, 1).flatten(0, 1) for span in spans]

    def coefficient(self, v: Tensor) -> Tensor:
        """v [b, t, h] in chunks, [k, l, h]; zero where a row fills up."""
        if self.rows is None or self.filled is None:
            return self.pieces(v, [(0, len(self.running), self.running[0])])[0]
        taken = v[0].index_select(0, self.rows.reshape(-1)).unflatten(0, self.rows.shape)
        return torch.where(self.filled.unsqueeze(-1), taken, 0)

    def spread(self, v: Tensor) -> Tensor:
        """v [s, ...] of each sequence to each of its chunks, [k, ...]."""
        if self.sequence is not None:
            return v.index_select(0, self.sequence)
        return v.unsqueeze(0).expand(len(self.running), *v.shape).flatten(0, 1)

    def sums_along_sequences(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v [k, ...] summed over the chunks before each one in its sequence, [k, ...], and over all of them, [s, ...]."""
        if self.order is None:
            by_rank = v.unflatten(0, (len(self.running), self.running[0]))
            sums = by_rank.cumsum(0)
            return (sums - by_rank).flatten(0, 1), sums[-1]
        # Each sequence has sums of its own: a difference of sums over the pack would pass on what is not finite.
        carry = torch.zeros_like(v[: self.running[0]])
        before, ended, start = [], [], 0
        for n, ranks in itertools.groupby(self.running):
            count = len(list(ranks))
            block = v[start : start + count * n].unflatten(0, (count, n))
            sums = carry[:n] + block.cumsum(0)
            before.append((sums - block).flatten(0, 1))
            ended.append(carry[n:])
            carry, start = sums[-1], start + count * n
        after = torch.cat([carry, *reversed(ended)])
        return torch.cat(before), after.index_select(0, torch.argsort(self.order))

    def put(self, blocks: list[Tensor]) -> Tensor:
        """The inverse of `pieces`: [k, l, ...] pieces to [b, t, ...]."""
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
        """v [b, t, ...] at the last token of each sequence, in the caller's order: [s, ...]; a copy, which keeps no v alive."""
        return v[:, -1].clone() if self.last is None else v[0].index_select(0, self.last)

    def first_token(self, v: Tensor) -> Tensor:
        """v [b, t, ...] at the first token of each sequence, in the caller's order: [s, ...]."""
        if self.last is None:
            return v[:, 0]
        return v[0].index_select(0, F.pad(self.last[:-1] + 1, (1, 0)))


def dense(batch: int, tokens: int, length: int) -> Chunks:
    """The table of `batch` sequences of `tokens` tokens each."""
    return Chunks(length=length, running=(batch,) * -(-tokens // length), tokens=tokens)


@functools.lru_cache(maxsize=16)
def packed(cu_seqlens: tuple[int, ...], length: int, device: torch.device) -> Chunks:
    """The table of sequences that lie one after another; cu_seqlens as in `mamba3.ops.scan`."""
    cu = torch.tensor(cu_seqlens, device="cpu")
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
        for name, value in dict(
            order=order, sequence=sequence, rows=rows, filled=filled, slots=slots, last=cu[1:] - 1
        ).items()
    }
    return Chunks(length=length, running=running, tokens=cu_seqlens[-1], **on_device)
