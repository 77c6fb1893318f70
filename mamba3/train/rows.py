"""Batches of dense rows, as functions of (seed, step): rows within documents, and rows that go on where they stopped.

`Rows`: every row is `seq_len` inputs of one document, from the zero state; what is left at a document's end is not used.
`Streams`: an epoch is a line of all documents in an order drawn from (seed, epoch), divided into as many equal streams as
a batch has rows; step k takes the next `seq_len` tokens of each. A row goes on from the state that the step before left in
its stream (truncated backpropagation through time), unless a document ends there; within a row the state is reset where a
document ends. Law: between two resets a stream reads one document, token after token, with nothing left out.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from mamba3.train.packing import Batch, gather
from mamba3.train.store import Tokens


class Rows:
    """Dense rows: inputs [b, seq_len], every epoch a permutation of all rows."""

    def __init__(self, data: Tokens, *, seq_len: int, batch_tokens: int, seed: int):
        counts = np.maximum(np.diff(data.offsets) - 1, 0) // seq_len
        if not counts.sum():
            raise ValueError(
                f"rows of seq_len = {seq_len} need a document of more tokens than that, but the longest has "
                f"{int(np.diff(data.offsets).max(initial=0))}; lower seq_len or take layout 'packed'."
            )
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self.starts = np.repeat(data.offsets[:-1], counts) + within * seq_len
        self.data, self.seq_len, self.rows, self.seed = data, seq_len, batch_tokens // seq_len, seed
        self.epoch_tokens = len(self.starts) * seq_len
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, 0 the first."""
        picked = range(step * self.rows, (step + 1) * self.rows)
        batch = gather(self.data, [(self._start(i), self.seq_len) for i in picked])
        return Batch(batch.inputs.view(self.rows, self.seq_len), batch.targets, None)

    def sample(self, tokens: int = 0) -> Iterator[Batch]:
        """Always the same rows, of `tokens` tokens or a little fewer (0: all), in batches of at most the usual rows."""
        rows = min(tokens // self.seq_len or 1, len(self.starts)) if tokens else len(self.starts)
        for first in range(0, rows, self.rows):
            picked = range(first, min(first + self.rows, rows))
            batch = gather(self.data, [(self._start(i), self.seq_len) for i in picked])
            yield Batch(batch.inputs.view(len(picked), self.seq_len), batch.targets, None)

    def _start(self, index: int) -> int:
        epoch, within = divmod(index, len(self.starts))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.starts))
        return int(self.starts[self._order[1][within]])


class _Line(NamedTuple):
    """An epoch's documents end to end: where each begins in the store, and where it ends in the line."""

    epoch: int
    starts: np.ndarray
    ends: np.ndarray


class Streams:
    """Rows that go on: a pack of the rows' pieces, with what enters each row."""

    def __init__(self, data: Tokens, *, seq_len: int, batch_tokens: int, seed: int):
        self.data, self.seq_len, self.rows, self.seed = data, seq_len, batch_tokens // seq_len, seed
        self.length = int(data.targets) // self.rows  # of a stream in an epoch
        self.steps = self.length // seq_len
        if not self.steps:
            raise ValueError(
                f"{self.rows} rows of seq_len = {seq_len} need as many tokens, but there are {data.targets:,}; lower "
                "batch_tokens or seq_len."
            )
        self.epoch_tokens = self.steps * self.rows * seq_len
        self._line: _Line | None = None

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """The rows of step `step` that belong to part `part` of `parts` (ranks and forward passes)."""
        epoch, column = divmod(step, self.steps)
        line = self._epoch(epoch)
        share = self.rows // parts
        spans, first, goes_on = [], [], []
        for row in range(part * share, (part + 1) * share):
            position = row * self.length + column * self.seq_len
            first.append(len(spans))
            document = int(np.searchsorted(line.ends, position, side="right"))
            goes_on.append(column > 0 and (document == 0 or line.ends[document - 1] != position))
            end = position + self.seq_len
            while position < end:
                begin = int(line.ends[document - 1]) if document else 0
                length = min(int(line.ends[document]), end) - position
                spans.append((int(line.starts[document]) + position - begin, length))
                position, document = position + length, document + 1
        batch = gather(self.data, spans)
        return batch._replace(rows=torch.tensor(first), goes_on=torch.tensor(goes_on))

    def _epoch(self, epoch: int) -> _Line:
        if self._line is None or self._line.epoch != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.data.documents)
            inputs = np.diff(self.data.offsets)[order] - 1
            order, inputs = order[inputs > 0], inputs[inputs > 0]
            self._line = _Line(epoch, self.data.offsets[:-1][order], np.cumsum(inputs))
        return self._line
