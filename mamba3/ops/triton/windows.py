"""Which tokens the programs of the backward pass work on: segments gathered in windows whose chunk states fit in scratch.

A window is a range of segments, and so of chunks and of tokens. The states of its chunks are recomputed before its
gradients are taken, in one buffer that all windows share: memory does not grow with the sequence.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.ops.triton.tables import Tables, tables


class Window(NamedTuple):
    """Half-open ranges."""

    segments: tuple[int, int]
    chunks: tuple[int, int]
    tokens: tuple[int, int]


class Plan(NamedTuple):
    """tables; windows; chunks [c, 5] int32: first token, its sequence's end and begin, the sequence, the segment."""

    tables: Tables
    windows: tuple[Window, ...]
    chunks: Tensor


@lru_cache(maxsize=64)
def plan(boundaries: tuple[int, ...], chunk: int, programs: int, most: int, device: torch.device) -> Plan:
    """For sequences that `boundaries` bound: at most `most` chunks a window, in about `programs` segments each.

    chunk: tokens a chunk. A sequence that fits in a window with others is not cut.
    """
    total = sum(-(-(b - a) // chunk) for a, b in itertools.pairwise(boundaries))
    longest = max(1, most // programs)
    wanted = max(programs, -(-total // longest))
    host = tables(boundaries, chunk, wanted, torch.device("cpu"))
    ranges = [(begin, end, first) for begin, end, first, *_ in host.segments.tolist()]
    edges = [first for *_, first in ranges] + [total]
    starts = [0]
    for k in range(len(ranges)):
        if edges[k + 1] - edges[starts[-1]] > most:
            starts.append(k)
    stops = [*starts[1:], len(ranges)]
    windows = tuple(
        Window((k, n), (edges[k], edges[n]), (ranges[k][0], ranges[n - 1][1]))
        for k, n in zip(starts, stops, strict=True)
    )
    sequences = host.sequences.long()
    owner = torch.repeat_interleave(torch.arange(len(sequences)), sequences[:, 1])
    segment = torch.repeat_interleave(torch.arange(len(ranges)), torch.tensor(edges).diff())
    columns = [host.chunks[:, 0], host.chunks[:, 1], sequences[owner, 2], owner, segment]
    chunks = torch.stack(columns, 1).to(torch.int32).to(device)
    return Plan(tables(boundaries, chunk, wanted, device), windows, chunks)
