"""Batches of a fixed number of tokens, packed from documents; the batch of a step is a pure function of (seed, step).

Documents are cut into pieces of at most `seq_len` inputs. An epoch is a permutation of all pieces, drawn from (seed,
epoch); epochs follow one another as one endless line of tokens, and step k takes tokens [k·T, (k + 1)·T) of it. Where a
batch ends, its last piece is cut and goes on in the next batch. Every piece starts from the zero state (`cu_seqlens`).
Law: a target is the token that follows its input in the same document; an epoch predicts every token but the documents'
first exactly once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from mamba3.train.store import Tokens


class Batch(NamedTuple):
    """inputs [1, T] and targets [T] (int64); cu_seqlens [S + 1] (int32), the bounds of the pieces."""

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Packing:
    """The batches of a set of documents: an endless line of epochs (`batch`), or a fixed sample of them (`sample`)."""

    def __init__(self, data: Tokens, *, seq_len: int, batch_tokens: int, seed: int):
        if data.targets < 1:
            raise ValueError(
                "documents to pack must hold at least one token, but there are none; give a larger corpus."
            )
        self.data, self.batch_tokens, self.seed = data, batch_tokens, seed
        self.starts, self.lengths = _pieces(data.offsets, seq_len)
        self.epoch_tokens = int(self.lengths.sum())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, 0 the first."""
        spans = []
        position, end = step * self.batch_tokens, (step + 1) * self.batch_tokens
        while position < end:
            epoch, within = divmod(position, self.epoch_tokens)
            order, ends = self._epoch(epoch)
            slot = int(np.searchsorted(ends, within, side="right"))
            piece = order[slot]
            left = int(ends[slot]) - within
            start = int(self.starts[piece] + self.lengths[piece]) - left
            length = min(left, end - position)
            spans.append((start, length))
            position += length
        return self._gather(spans)

    def sample(self, tokens: int = 0) -> Iterator[Batch]:
        """Always the same `tokens` targets (0: all), from pieces all over the documents, in batches of whole pieces.

        A batch has at most `batch_tokens` tokens, or one piece that is longer.
        """
        budget = tokens or self.epoch_tokens
        spans, size = [], 0
        for piece in self._epoch(0)[0]:
            start, length = int(self.starts[piece]), int(self.lengths[piece])
            if size and size + length > self.batch_tokens:
                yield self._gather(spans)
                spans, size = [], 0
            if budget <= 0:
                break
            length = min(length, budget)
            spans.append((start, length))
            size, budget = size + length, budget - length
        if spans:
            yield self._gather(spans)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(pieces in this epoch's order, where each one ends in the epoch)."""
        if epoch not in self._epochs:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
            newest = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs = newest | {epoch: (order, np.cumsum(self.lengths[order]))}
        return self._epochs[epoch]

    def _gather(self, spans: list[tuple[int, int]]) -> Batch:
        tokens = self.data.tokens
        inputs = np.concatenate([tokens[start : start + length] for start, length in spans]).astype(np.int64)
        targets = np.concatenate([tokens[start + 1 : start + 1 + length] for start, length in spans]).astype(np.int64)
        bounds = np.cumsum([0, *(length for _, length in spans)], dtype=np.int32)
        return Batch(torch.from_numpy(inputs)[None], torch.from_numpy(targets), torch.from_numpy(bounds))


def _pieces(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, inputs) of every piece. A document of n tokens has n − 1 inputs: its last token is only a target."""
    inputs = np.diff(offsets) - 1
    counts = -(-inputs // seq_len)
    first_piece = np.cumsum(counts) - counts
    index = np.arange(counts.sum()) - np.repeat(first_piece, counts)  # of a piece within its document
    starts = np.repeat(offsets[:-1], counts) + index * seq_len
    lengths = np.minimum(seq_len, np.repeat(inputs, counts) - index * seq_len)
    return starts.astype(np.int64), lengths.astype(np.int64)
