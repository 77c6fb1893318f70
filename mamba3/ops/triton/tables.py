"""Which tokens each program works on: chunks, segments and sequences, the same tables for dense and packed inputs.

Tokens are numbered through the whole batch. A chunk lies in one segment, a segment in one sequence.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """int32 tables on the device, and their sizes.

    chunks [c, 2]: first token, end of its sequence. sequences [s, 4]: first chunk, chunks, first token, end.
    segments [k, 5]: first token, end, first chunk, sequence, and the sequence again if it ends there, else -1.
    sequence_segments [s, 2]: first segment, segments.
    """

    chunks: Tensor
    sequences: Tensor
    segments: Tensor
    sequence_segments: Tensor

    @property
    def split(self) -> bool:
        """Whether some sequence has more than one segment."""
        return self.segments.shape[0] > self.sequences.shape[0]

    def closed(self) -> Tables:
        """With an empty segment at the end of each sequence: what enters it is the sequence's last state."""
        count = self.sequence_segments.shape[0]
        own = torch.arange(count, device=self.segments.device, dtype=torch.int32)
        first, segments = self.sequence_segments.unbind(1)
        ends = self.sequences[:, 3]
        empty = torch.stack([ends, ends, self.sequences[:, :2].sum(1), own, own], 1)
        order = torch.argsort(torch.cat([self.segments[:, 3], own]), stable=True)
        real = self.segments.clone()
        real[:, 4] = -1  # no state of these is a sequence's last
        table = torch.cat([real, empty])[order].to(torch.int32)
        return self._replace(segments=table, sequence_segments=torch.stack([first + own, segments + 1], 1))


def _blocks(begin: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of `size` in each range begin..end: how many in each, and the range and first element of every block."""
    counts = (end - begin + size - 1) // size
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    rank = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return counts, owner, begin[owner] + rank * size


@lru_cache(maxsize=64)
def tables(boundaries: tuple[int, ...], chunk: int, programs: int, device: torch.device) -> Tables:
    """Tables of the sequences that `boundaries` bound, for about `programs` segments; `chunk` is tokens a chunk."""
    cu = torch.tensor(boundaries)
    begin, end = cu[:-1], cu[1:]
    chunk_counts, chunk_owner, chunk_begin = _blocks(begin, end, chunk)
    length = max(1, -(-int(chunk_counts.sum()) // max(1, programs))) * chunk
    counts, owner, segment_begin = _blocks(begin, end, length)
    segment_end = torch.minimum(segment_begin + length, end[owner])
    first_chunk = chunk_counts.cumsum(0) - chunk_counts
    in_chunk = first_chunk[owner] + (segment_begin - begin[owner]) // chunk
    ends = torch.where(segment_end == end[owner], owner, -1)
    columns = (
        (chunk_begin, end[chunk_owner]),
        (first_chunk, chunk_counts, begin, end),
        (segment_begin, segment_end, in_chunk, owner, ends),
        (counts.cumsum(0) - counts, counts),
    )
    return Tables(*(torch.stack(c, dim=1).to(torch.int32).to(device) for c in columns))


@lru_cache(maxsize=64)
def closed_tables(boundaries: tuple[int, ...], chunk: int, programs: int, device: torch.device) -> Tables:
    """`tables` whose segments leave every sequence's last state to be merged."""
    host = tables(boundaries, chunk, programs, torch.device("cpu")).closed()
    return Tables(*(v.contiguous().to(device) for v in host))
