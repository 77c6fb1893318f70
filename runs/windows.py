"""Held-out tokens read in windows of a length: the same targets whatever the length, so that contexts compare."""

from collections.abc import Iterator

import numpy as np

from mamba3.train.packing import Batch, gather
from mamba3.train.rows import Rows
from mamba3.train.store import Tokens


def spread_starts(data: Tokens, longest: int, tokens: int) -> np.ndarray:
    """Where runs of `longest` tokens begin, all over the documents, about `tokens` tokens in all."""
    starts = np.sort(Rows(data, seq_len=longest, batch_tokens=longest, seed=0).starts)
    count = max(1, min(tokens // longest, len(starts)))
    return starts[:: max(1, len(starts) // count)][:count]


class Windows:
    """Runs of `longest` tokens, each read in windows of `length` from the zero state."""

    def __init__(self, data: Tokens, starts: np.ndarray, longest: int, length: int):
        self.data, self.length = data, length
        self.starts = [int(start) + offset for start in starts for offset in range(0, longest, length)]

    def batches(self, rows: int) -> Iterator[Batch]:
        """Batches of `rows` windows; the last may have fewer."""
        for first in range(0, len(self.starts), rows):
            spans = [(start, self.length) for start in self.starts[first : first + rows]]
            batch = gather(self.data, spans)
            yield Batch(batch.inputs.view(len(spans), self.length), batch.targets, None)
