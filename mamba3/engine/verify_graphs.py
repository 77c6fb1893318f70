"""Verification as CUDA graphs: what `engine.graphs` is to a decode step, for a token and the guesses behind it.

Of each padded batch size there are two: one reads 1 + `guesses` tokens of rows 0 .. m - 1 and leaves their factors
(`lm.draft`), one moves each row on by as many of them as the host has found right, a number that it reads on the device and
that is 0 for rows of padding, whose state stays bit for bit. Between the two the host waits for the tokens, and nowhere else;
the second runs while it prepares the next step. Factors are read before another graph runs: all sizes share their memory.

Law: logits and states are those of `Mamba3LM.verify` and `Draft.accept`, but for the rounding of products of m rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mamba3.engine import graphs
from mamba3.engine.channel import Channel
from mamba3.engine.graphs import CaptureFailed, Replay, pages_read
from mamba3.engine.state_pool import StatePool
from mamba3.lm import Mamba3LM
from mamba3.lm.draft import Draft

# Guesses save reading weights, which many rows share anyway; and logits of all their tokens would take gigabytes.
MOST_ROWS = 64


class VerifyGraphs:
    """The graphs of one model over one pool, for `guesses` guessed tokens a row."""

    def __init__(self, model: Mamba3LM, pool: StatePool, guesses: int):
        self._model, self._pool, self._length = model, pool, 1 + guesses
        self._sizes = graphs.sizes(min(pool.rows, MOST_ROWS))
        device, rows = model.embedding.weight.device, self._sizes[-1]
        self._tokens = torch.zeros(rows * self._length, dtype=torch.int64, device=device)
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._to, self._right = Channel(len(self._tokens), device), Channel(rows, device)
        self._memory: Any = None
        self._draft: Draft | None = None  # of the graph that is captured or imitated
        self._replays: dict[tuple[int, int], tuple[Replay, Replay]] = {}  # by size, and pages of each row of a hybrid

    @property
    def rows(self) -> int:
        """Rows of the largest graph."""
        return self._sizes[-1]

    @property
    def fit(self) -> bool:
        """Whether the longest row has room for as many tokens as a graph reads."""
        return self._pool.pages is None or self._pool.room >= self._length - 1

    def verify(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Callable[[Sequence[int]], None]]:
        """Let the first rows read their tokens, at most 1 + guesses each: logits [n, 1 + guesses, padded vocabulary], good
        until the next call, and what keeps the first counts[i] tokens of each row, to be called before it.

        Raises CaptureFailed.
        """
        size = next(size for size in self._sizes if size >= len(tokens))
        read, keep = self._replay(size, pages_read(self._pool, self._length))
        rows = [[*row, *[0] * (self._length - len(row))] for row in tokens]
        self._to.send([token for row in rows for token in row], self._tokens)

        def accept(counts: Sequence[int]) -> None:
            self._right.send([*counts, *[0] * (size - len(counts))], self._counts)
            keep()

        return read()[: len(tokens)], accept

    def capture(self) -> Iterator[tuple[int, int]]:
        """Capture what is not captured yet, as `DecodeGraphs.capture` does: pairs of graphs. Raises CaptureFailed."""
        for done, size in enumerate(reversed(self._sizes), 1):
            self._replay(size, pages_read(self._pool, self._length))
            yield done, len(self._sizes)

    def _replay(self, size: int, width: int) -> tuple[Replay, Replay]:
        if (size, width) not in self._replays:
            self._replays[size, width] = self._capture(size, width)
        return self._replays[size, width]

    @torch.no_grad()
    def _capture(self, size: int, width: int) -> tuple[Replay, Replay]:
        tokens, counts = self._tokens[: size * self._length].view(size, self._length), self._counts[:size]

        def read() -> Tensor:
            logits, self._draft = self._model.verify(tokens, self._pool.view(size, width=width))
            return logits

        def keep() -> Tensor:
            assert self._draft is not None
            return self._draft.accept(counts).tokens

        try:
            reading, self._memory = graphs.record(read, self._memory)
            reading()  # so that what `keep` takes when it warms up are factors
            counts.zero_()  # and it moves no row
            keeping, self._memory = graphs.record(keep, self._memory)
        except RuntimeError as error:
            raise CaptureFailed(f"verification of {size} rows could not be captured ({error})") from error
        finally:
            self._draft = None  # other sizes may have its memory
        return reading, keeping
