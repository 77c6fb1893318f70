"""Which tokens the programs of the backward pass work on: segments gathered in windows whose chunk states fit in scratch.

A window is a range of segments, and so of chunks. The states of its chunks are recomputed before its gradients are taken, in
one buffer that all windows share: memory does not grow with the sequence. Its gradients are taken piece by piece, because
the rows that heads are summed from take as much room again.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.ops.triton.tables import Tables, tables


class Piece(NamedTuple):
    """Half-open ranges."""

    chunks: tuple[int, int]
    tokens: tuple[int, int]


class Window(NamedTuple):
    """Half-open ranges, and the pieces that fill them."""

    segments: tuple[int, int]
    chunks: tuple[int, int]
    pieces: tuple[Piece, ...]


class Plan(NamedTuple):
    """tables; windows; chunks [c, 5] int32: first token, its sequence's end and begin, the sequence, the segment."""

    tables: Tables
    windows: tuple[Window, ...]
    chunks: Tensor


@lru_cache(maxsize=64)
def plan(boundaries: tuple[int, ...], chunk: int, programs: int, most: int, piece: int, device: torch.device) -> Plan:
    """For sequences that `boundaries` bound: at most `most` chunks a window, in about `programs` segments each, and `piece`
    chunks a piece.

    chunk: tokens a chunk. A sequence that fits in a window with others is not cut.
    """
    total = sum(-(-(b - a) // chunk) for a, b in itertools.pairwise(boundaries))
    longest = max(1, most // programs)
    wanted = max(programs, -(-total // longest))
    host = tables(boundaries, chunk, wanted, torch.device("cpu"))
    edges = [first for _, _, first, *_ in host.segments.tolist()] + [total]
    starts = [0]
    for k in range(len(edges) - 1):
        if edges[k + 1] - edges[starts[-1]] > most:
            starts.append(k)
    stops = [*starts[1:], len(edges) - 1]
    spans = [(begin, min(begin + chunk, end)) for begin, end in host.chunks[:, :2].tolist()]

    def pieces(first: int, last: int) -> tuple[Piece, ...]:
        cuts = [*range(first, last, piece), last]
        return tuple(Piece((a, b), (spans[a][0], spans[b - 1][1])) for a, b in itertools.pairwise(cuts))

    windows = tuple(
        Window((k, n), (edges[k], edges[n]), pieces(edges[k], edges[n])) for k, n in zip(starts, stops, strict=True)
    )
    sequences = host.sequences.long()
    owner = torch.repeat_interleave(torch.arange(len(sequences)), sequences[:, 1])
    segment = torch.repeat_interleave(torch.arange(len(edges) - 1), torch.tensor(edges).diff())
    columns = [host.chunks[:, 0], host.chunks[:, 1], sequences[owner, 2], owner, segment]
    chunks = torch.stack(columns, 1).to(torch.int32).to(device)
    return Plan(tables(boundaries, chunk, wanted, device), windows, chunks)
