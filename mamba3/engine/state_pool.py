"""Rows of state, allocated once: the sequences being continued are rows 0 .. n - 1 of one batch.

A decode step runs in place on the view of the first n rows, so that no state is gathered or scattered. When row i is freed,
row n - 1 moves into its place: one copy. Caches of attention layers are not rows: each row has a list of pages
(`engine.pages`), and the list moves instead of what they hold.

What was in a row is overwritten whole when the row is given out and zeroed when it is freed: no sequence can see another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from mamba3.engine.pages import Held, Pages, StoredState, pages_of
from mamba3.lm import LMState, Mamba3LM
from mamba3.lm.state import LayerState
from mamba3.nn import AttentionState, PagedState
from mamba3.ops import State


class StatePool:
    """`used` rows of at most `rows` hold sequences, always the first ones.

    pages: of the caches, for a model with attention layers; rows then hold at most `max_length` tokens. state_dtype: of the
    matrix states S, if another than that of the model.
    """

    def __init__(
        self,
        model: Mamba3LM,
        rows: int,
        max_length: int,
        pages: Pages | None = None,
        state_dtype: torch.dtype | None = None,
    ):
        self.rows, self.max_length, self.used, self.pages = rows, max_length, 0, pages
        self._state = model.init_state(rows)
        self._wide = [layer.S.dtype for layer in self._state.layers if isinstance(layer, State)]
        if state_dtype is not None:
            self._state.layers = [_kept_in(layer, state_dtype) for layer in self._state.layers]
        self._lengths = [0] * rows  # tokens read, known without asking the device
        self._pages: list[list[int]] = [[] for _ in range(rows)]
        width, device = 0 if pages is None else pages_of(max_length), self._state.tokens.device
        self._table = torch.zeros(rows, width, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._state.nbytes + (0 if self.pages is None else self.pages.nbytes + self._table.nbytes)

    @property
    def room(self) -> int:
        """Tokens that every used row can still take before `max_length`, beside the next one."""
        return max(0, self.max_length - self.longest - 1)

    @property
    def longest(self) -> int:
        """Tokens that the longest used row has read."""
        return max(self._lengths[: self.used], default=0)

    def add(self, state: LMState) -> int:
        """Copy a state of one sequence into a free row; which one. Raises OutOfPages."""
        assert self.used < self.rows and state.batch_size == 1
        self.write(self.used, state)
        self.used += 1
        return self.used - 1

    @torch.no_grad()
    def write(self, row: int, state: LMState) -> None:
        """Overwrite a row with a state of one sequence. Raises OutOfPages, and the row is then as it was."""
        length = int(state.tokens)
        if self.pages is not None:
            stored = self.pages.store(state)
            self._give(row, self.pages.continued(stored.held.pages, length))
            state = stored
        _copy(self._row(row), _tensors(layer for layer in state.layers if isinstance(layer, State)))
        for numbers in (self._state.tokens, *(cache.length for cache in self._caches())):
            numbers[row] = state.tokens[0]
        self._lengths[row] = length

    def read(self, row: int) -> LMState:
        """A copy of a row, as a state of one sequence."""
        rest = self._copies(row)
        tokens, name = self._state.tokens[row : row + 1].clone(), self._state.fingerprint
        if self.pages is None:
            return LMState(cast("list[LayerState]", rest), tokens, name)
        return self.pages.assemble(rest, self._pages[row], tokens, name)

    def share(self, row: int) -> LMState:
        """`read` for the engine's own use: caches stay in pages, the full ones are shared. Raises OutOfPages."""
        if self.pages is None:
            return self.read(row)
        held = Held(self.pages, self.pages.continued(self._pages[row], self._lengths[row]))
        return StoredState(self._copies(row), self._state.tokens[row : row + 1].clone(), self._state.fingerprint, held)

    def view(self, stop: int, start: int = 0, room: int = 0, width: int | None = None) -> LMState:
        """Rows start .. stop - 1 as a state that shares the pool's memory, with room for so many more tokens.

        width: pages of each table, as many as the longest row takes unless given. Rows must have their pages: see `wants`.
        """
        longest = max(self._lengths[start:stop], default=0)
        width = pages_of(longest + room) if width is None else width
        layers: list[LayerState] = []
        for i, layer in enumerate(self._state.layers):
            if isinstance(layer, State):
                layers.append(layer.map(lambda v: v[start:stop]))
            else:
                layers.append(self._paged(i, slice(start, stop), width, longest))
        return LMState(layers, self._state.tokens[start:stop], self._state.fingerprint)

    def wants(self, row: int, room: int) -> int:
        """Pages that a row lacks to read so many more tokens."""
        return 0 if self.pages is None else max(0, pages_of(self._lengths[row] + room) - len(self._pages[row]))

    def extend(self, row: int, room: int) -> None:
        """Give a row the pages to read so many more tokens. Raises OutOfPages."""
        missing = self.wants(row, room)
        if missing and self.pages is not None:
            taken, have = self.pages.take(missing), len(self._pages[row])
            self._table[row, have : have + missing] = torch.tensor(taken, device=self._table.device)
            self._pages[row] += taken

    def advance(self, row: int, tokens: int) -> None:
        """Note that a row's view has read tokens."""
        self._lengths[row] += tokens

    def advance_all(self, rows: int) -> None:
        """Note that the view of the first rows has read a token."""
        self._lengths[:rows] = [length + 1 for length in self._lengths[:rows]]

    def free(self, row: int) -> int | None:
        """Give a row back. The last used row moves into its place: which one moved, None if it was the last itself."""
        last = self.used - 1
        if row != last:
            self._move(last, row)
        self._zero(last)
        self.used = last
        return None if row == last else last

    def clear(self) -> None:
        """Zero every row and give out every page anew, in the same memory, whatever state they are in."""
        for layer in self._fixed():
            layer.map(Tensor.zero_)
        for numbers in (self._state.tokens, self._table, *(cache.length for cache in self._caches())):
            numbers.zero_()
        self.used, self._lengths, self._pages = 0, [0] * self.rows, [[] for _ in range(self.rows)]
        self.pages = None if self.pages is None else self.pages.renewed()

    # -- parts

    def _fixed(self) -> list[State]:
        return [layer for layer in self._state.layers if isinstance(layer, State)]

    def _row(self, row: int) -> list[Tensor]:
        """Every tensor of a row."""
        return [v[row : row + 1] for v in _tensors(self._fixed())]

    def _caches(self) -> list[AttentionState]:
        """Of attention layers, for the lengths: keys and values are in pages."""
        return [layer for layer in self._state.layers if isinstance(layer, AttentionState)]

    def _copies(self, row: int) -> list[State]:
        rows = [layer.map(lambda v: v[row : row + 1].clone()) for layer in self._fixed()]
        return [_kept_in(state, dtype) for state, dtype in zip(rows, self._wide, strict=True)]

    def _paged(self, layer: int, rows: slice, width: int, longest: int) -> LayerState:
        assert self.pages is not None
        k, v = self.pages.kv[:, self.pages.layers.index(layer)]
        cache = self._state.layers[layer]
        assert isinstance(cache, AttentionState)
        return cast("LayerState", PagedState(k, v, self._table[rows, :width], cache.length[rows], longest))

    def _give(self, row: int, pages: Sequence[int]) -> None:
        """The row's pages are these, which it holds already, and no others."""
        assert self.pages is not None
        self.pages.drop(self._pages[row])
        self._pages[row] = list(pages)
        self._table[row] = 0
        self._table[row, : len(pages)] = torch.tensor(self._pages[row], device=self._table.device)

    def _move(self, source: int, target: int) -> None:
        _copy(self._row(target), self._row(source))
        for numbers in (self._state.tokens, self._table, *(cache.length for cache in self._caches())):
            numbers[target] = numbers[source]
        if self.pages is not None:
            self.pages.drop(self._pages[target])
        self._pages[target], self._pages[source] = self._pages[source], []
        self._lengths[target] = self._lengths[source]

    def _zero(self, row: int) -> None:
        if self.pages is not None:
            self._give(row, [])
        torch._foreach_zero_(self._row(row))  # pyright: ignore[reportPrivateImportUsage]
        for numbers in (self._state.tokens, *(cache.length for cache in self._caches())):
            numbers[row] = 0
        self._lengths[row] = 0


def _tensors(states: Iterable[State]) -> list[Tensor]:
    return [v for state in states for v in state if v is not None]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """A few launches for the tensors of all layers, of which there are a hundred."""
    assert len(targets) == len(sources)
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _kept_in(layer, dtype: torch.dtype):
    """A layer's state with S in another dtype."""
    return layer._replace(S=layer.S.to(dtype)) if isinstance(layer, State) else layer
