"""Who has which row of the pool: sequences are given one, parked for another's sake, swapped out, and give it back.

A sequence that loses its row takes its state along and goes on later as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mamba3.engine.counters import Counters
from mamba3.engine.pages import OutOfPages
from mamba3.engine.paging import Paging
from mamba3.engine.prefix_cache import PrefixCache
from mamba3.engine.scheduler import Scheduler
from mamba3.engine.sequence import Sequence, Stage
from mamba3.engine.state_pool import StatePool
from mamba3.lm import LMState


class Rows:
    """Row i of the pool is that of `scheduler.running[i]`.

    sequences: everything under way, the oldest first. paging: who gets pages, for a model that has them.
    """

    def __init__(
        self,
        pool: StatePool,
        scheduler: Scheduler,
        cache: PrefixCache,
        sequences: Callable[[], Iterable[Sequence]],
        counters: Counters,
    ):
        self._pool, self._scheduler, self._counters = pool, scheduler, counters
        self.paging: Paging | None = None
        if pool.pages is not None:
            self.paging = Paging(pool, pool.pages, scheduler, cache, sequences, self.swap_out)

    def give(self, sequence: Sequence) -> bool:
        """Whether the sequence got a row for its state; where there are no pages for it, it waits on."""
        assert sequence.state is not None
        sequence.stage = Stage.WAITING
        if self.paging is not None and not self.paging.suffice(sequence):
            self._scheduler.put_back(sequence)
            return False
        row = self._pool.add(sequence.state)
        assert row == len(self._scheduler.running)
        self._scheduler.running.append(sequence)
        sequence.state, sequence.stage, sequence.since_admitted = None, Stage.RUNNING, 0
        return True

    def free(self, sequence: Sequence) -> None:
        """Take a sequence's row back; the last row moves into its place."""
        running, row = self._scheduler.running, self.of(sequence)
        self._pool.free(row)
        last = running.pop()
        if row < len(running):
            running[row] = last

    def of(self, sequence: Sequence) -> int:
        """The row of a running sequence."""
        return self._scheduler.running.index(sequence)

    def read(self, sequence: Sequence) -> LMState:
        """A copy of the state of a sequence that runs, or that lost its row after it did."""
        if sequence.state is not None:
            pages = self._pool.pages
            return sequence.state if pages is None else pages.fetch(sequence.state)
        return self._pool.read(self.of(sequence))

    def share(self, sequence: Sequence) -> LMState:
        """`read` for the engine's own use. Raises OutOfPages."""
        return self._pool.share(self.of(sequence))

    def preempt(self) -> None:
        """Park the sequence whose quantum is used up: one copy of its state out of the pool."""
        sequence = self._scheduler.over_quantum()
        if sequence is None:
            return
        try:
            state = self.share(sequence)
        except OutOfPages:
            state = self.read(sequence).to("cpu")
        self.free(sequence)
        sequence.state, sequence.stage = state, Stage.WAITING
        self._scheduler.put_back(sequence)
        self._counters.preemptions += 1

    def swap_out(self, sequence: Sequence) -> None:
        """Take a sequence's state out of its row and out of the pages, for others' sake."""
        if sequence.stage is Stage.RUNNING:
            state = self.read(sequence)
            self.free(sequence)
            sequence.state = state
        elif sequence.stage is Stage.PROMPT:
            self._scheduler.remove(sequence)
        assert sequence.state is not None and self._pool.pages is not None
        sequence.state = self._pool.pages.fetch(sequence.state).to("cpu")
        if sequence.stage is not Stage.WAITING:
            sequence.stage = Stage.WAITING
            self._scheduler.put_back(sequence, first=True)
        self._counters.swaps += 1
