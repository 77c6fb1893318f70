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
    """inputs [b, t] and targets [b t] (int64); cu_seqlens [S + 1] (int32), the bounds of packed pieces, then b = 1.

    Of rows that go on (`Streams`): rows [b], for each row the index of its first piece in the pack; goes_on [b], whether
    that piece goes on from the state of the step before. Of a rank's part (`part_of`): parts, two flags of every rank's part,
    whether it begins within a piece, and whether its last piece began in it.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None
    rows: torch.Tensor | None = None
    goes_on: torch.Tensor | None = None
    parts: tuple[list[bool], list[bool]] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The tensors on a device; what describes them stays on the CPU, where it is read."""
        inputs, targets = (v.to(device, non_blocking=True) for v in self[:2])
        return self._replace(inputs=inputs, targets=targets)

    def described_on_cpu(self) -> "Batch":
        """What describes the tokens brought back from where DistributedDataParallel and FSDP move all tensors to."""
        described = {"cu_seqlens": self.cu_seqlens, "rows": self.rows, "goes_on": self.goes_on}
        return self._replace(**{name: v if v is None else v.cpu() for name, v in described.items()})


def part_of(batch: Batch, index: int, parts: int) -> Batch:
    """The index-th of `parts` equal runs of a packed batch's tokens. Raises ValueError where the tokens do not divide."""
    tokens = batch.targets.numel()
    if tokens % parts:
        raise ValueError(
            f"{tokens} tokens must be a multiple of the {parts} ranks that share them; change micro_tokens."
        )
    assert batch.cu_seqlens is not None
    bounds, length = batch.cu_seqlens.tolist(), tokens // parts
    spans = [(i * length, (i + 1) * length) for i in range(parts)]
    goes_on = [begin not in bounds for begin, _ in spans]
    inner = [[bound - begin for bound in bounds if begin < bound < end] for begin, end in spans]
    fresh = [bool(within) or not on for within, on in zip(inner, goes_on, strict=True)]
    begin, end = spans[index]
    own = torch.tensor([0, *inner[index], length], dtype=torch.int32)
    return Batch(batch.inputs[:, begin:end], batch.targets[begin:end], own, parts=(goes_on, fresh))


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
        return gather(self.data, spans)


def gather(data: Tokens, spans: list[tuple[int, int]]) -> Batch:
    """The batch of some spans (start, inputs), each within one document, packed."""
    pieces = [data.read(start, length + 1).astype(np.int64) for start, length in spans]
    inputs = np.concatenate([piece[:-1] for piece in pieces])
    targets = np.concatenate([piece[1:] for piece in pieces])
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
