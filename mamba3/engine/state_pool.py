"""Rows of state, allocated once: the sequences being continued are rows 0 .. n - 1 of one batch.

A decode step runs in place on the view of the first n rows, so that no state is gathered or scattered. When row i is freed,
row n - 1 moves into its place: one copy. Caches of attention layers are rows too; they grow, for all rows together, by
doubling up to `max_length`.

What was in a row is overwritten whole when the row is given out and zeroed when it is freed: no sequence can see another's.
"""

from __future__ import annotations

import torch

from mamba3.lm import LMState, Mamba3LM
from mamba3.nn.attention import AttentionState, whole_pages
from mamba3.ops import State


class StatePool:
    """`used` rows of at most `rows` hold sequences, always the first ones."""

    def __init__(self, model: Mamba3LM, rows: int, max_length: int):
        self.rows, self.max_length, self.used = rows, max_length, 0
        self._state = model.init_state(rows)
        self._lengths = [0] * rows  # tokens read, known without asking the device

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._state.nbytes

    @property
    def room(self) -> int:
        """Tokens that every used row can still take before `max_length`, beside the next one."""
        return max(0, self.max_length - max(self._lengths[: self.used], default=0) - 1)

    def add(self, state: LMState) -> int:
        """Copy a state of one sequence into a free row; which one."""
        assert self.used < self.rows and state.batch_size == 1
        self.used += 1
        self.write(self.used - 1, state)
        return self.used - 1

    def write(self, row: int, state: LMState) -> None:
        """Overwrite a row with a state of one sequence."""
        length = int(state.tokens)
        self._reserve(max((s.used for s in state.layers if isinstance(s, AttentionState)), default=0))
        for mine, theirs in zip(self._state.layers, state.layers, strict=True):
            if isinstance(mine, State):
                assert isinstance(theirs, State)
                mine.map(lambda v, row=row: v[row : row + 1]).copy_(theirs)
            else:
                assert isinstance(theirs, AttentionState)
                for target, source in ((mine.k, theirs.k), (mine.v, theirs.v)):
                    target[row, : theirs.used] = source[0, : theirs.used]
                    target[row, theirs.used :] = 0
                mine.length[row] = theirs.length[0]
        self._state.tokens[row] = state.tokens[0]
        self._lengths[row] = length

    def read(self, row: int) -> LMState:
        """A copy of a row, as a state of one sequence."""
        return self.view(row + 1, row).clone()

    def view(self, stop: int, start: int = 0, room: int = 0) -> LMState:
        """Rows start .. stop - 1 as a state that shares the pool's memory, with room for so many more tokens."""
        longest = max(self._lengths[start:stop], default=0)
        self._reserve(longest + room)
        layers = []
        for layer in self._state.layers:
            if isinstance(layer, State):
                layers.append(layer.map(lambda v: v[start:stop]))
            else:
                k, v = (w[start:stop, : whole_pages(longest + room)] for w in (layer.k, layer.v))
                layers.append(AttentionState(k, v, layer.length[start:stop], longest))
        return LMState(layers, self._state.tokens[start:stop], self._state.fingerprint)

    def advance(self, row: int, tokens: int) -> None:
        """Note that a row's view has read tokens."""
        self._lengths[row] += tokens

    def free(self, row: int) -> int | None:
        """Give a row back. The last used row moves into its place: which one moved, None if it was the last itself."""
        last = self.used - 1
        if row != last:
            self.write(row, self.view(last + 1, last))
        self._zero(last)
        self.used = last
        return None if row == last else last

    def _zero(self, row: int) -> None:
        for layer in self._state.layers:
            tensors = layer if isinstance(layer, State) else (layer.k, layer.v, layer.length)
            for v in tensors:
                if v is not None:
                    v[row].zero_()
        self._state.tokens[row] = 0
        self._lengths[row] = 0

    def _reserve(self, tokens: int) -> None:
        """Room for so many tokens in every cache; a model without attention has none."""
        for i, layer in enumerate(self._state.layers):
            if isinstance(layer, AttentionState) and layer.k.shape[1] < tokens:
                if tokens > self.max_length:
                    raise ValueError(f"{tokens} tokens do not fit caches of max_length = {self.max_length} tokens.")
                grown = layer.grow(tokens)
                capacity = min(grown.k.shape[1], whole_pages(self.max_length))
                self._state.layers[i] = grown._replace(k=grown.k[:, :capacity], v=grown.v[:, :capacity])


def empty_rows(state: LMState) -> bool:
    """Whether every number of a state is zero: what a freed row holds."""
    tensors = [v for layer in state.layers for v in layer if isinstance(v, torch.Tensor)]
    return not any(bool(v.any()) for v in (*tensors, state.tokens))
