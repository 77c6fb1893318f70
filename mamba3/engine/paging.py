"""Who gets pages when there are too few: snapshots give way to sequences, those that wait to the others, younger to older ones.

A sequence that gives way is swapped out: its state leaves the pages for the host's memory, whole, and it waits at the head of
its queue. It goes on later as if nothing had been. The oldest that is read or continued can always go on, for no sequence is
longer than all pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mamba3.engine.config import EngineConfig
from mamba3.engine.pages import Pages, StoredState, attention_layers, page_bytes, pages_of
from mamba3.engine.prefix_cache import PrefixCache
from mamba3.engine.scheduler import Scheduler
from mamba3.engine.sequence import Sequence, Stage
from mamba3.engine.state_pool import StatePool
from mamba3.lm import Mamba3LM
from mamba3.nn.cache import PAGE


def make_pages(model: Mamba3LM, config: EngineConfig) -> Pages | None:
    """The pages that the configuration allows and rows and snapshots can use; None for a model without attention layers.

    Raises ValueError where they would hold no sequence.
    """
    if not attention_layers(model):
        return None
    fit, useful = config.attention_bytes // page_bytes(model), 2 + 2 * config.rows * pages_of(config.max_length)
    if fit < 3:
        raise ValueError(
            f"attention_bytes must hold at least 3 pages of {page_bytes(model):,} bytes; it is {config.attention_bytes:,}."
        )
    return Pages(model, min(fit, useful))


def longest_sequence(pages: Pages | None, config: EngineConfig) -> int:
    """Tokens that one sequence of a hybrid may have, its prompt included: one page is left for a copy."""
    return config.max_length if pages is None else min(config.max_length, (pages.count - 1) * PAGE)


def said(sequence: Sequence) -> int:
    """Tokens of a sequence, history, prompt and continuation."""
    return len(sequence.request.history) + len(sequence.tokens) + len(sequence.chosen)


class Paging:
    """sequences: everything under way, the oldest first. swap_out: takes a sequence's state out of its row and its pages."""

    def __init__(
        self,
        pool: StatePool,
        pages: Pages,
        scheduler: Scheduler,
        cache: PrefixCache,
        sequences: Callable[[], Iterable[Sequence]],
        swap_out: Callable[[Sequence], None],
    ):
        self._pool, self._pages, self._scheduler, self._cache = pool, pages, scheduler, cache
        self._sequences, self._swap_out = sequences, swap_out

    def give_rows(self, room: int) -> None:
        """Let every running sequence have the pages to read so many more tokens; some may be swapped out for it."""
        running, pool, pages = self._scheduler.running, self._pool, self._pages
        if sum(pool.wants(row, room) for row in range(len(running))) > pages.free:
            for sequence in [s for s in self._sequences() if s.stage is Stage.RUNNING]:
                while sequence.stage is Stage.RUNNING and pool.wants(running.index(sequence), room) > pages.free:
                    if not self._shrink(sequence):
                        self._swap_out(sequence)
                if sequence.stage is Stage.RUNNING:
                    pool.extend(running.index(sequence), room)
        for row in range(len(running)):
            pool.extend(row, room)

    def suffice(self, sequence: Sequence) -> bool:
        """Whether there are pages to put a sequence's state into a row."""
        assert sequence.state is not None
        wanted = 1  # for a copy of the last one
        if not isinstance(sequence.state, StoredState):
            wanted += pages_of(int(sequence.state.tokens))
        while wanted > self._pages.free:
            if not self._shrink(sequence):
                return False
        return True

    def readable(self, pieces: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Those of the pieces of prompts for whose states there are pages."""
        planned, chosen = 0, []
        for sequence, count in pieces:
            if sequence.stage is not Stage.PROMPT:
                continue  # it was swapped out for one before it
            planned += self._taken_by(sequence, count)
            while planned > self._pages.free and self._shrink(sequence):
                pass
            if planned > self._pages.free:
                planned -= self._taken_by(sequence, count)
            else:
                chosen.append((sequence, count))
        return [piece for piece in chosen if piece[0].stage is Stage.PROMPT]

    def admission(self) -> Callable[[Sequence], bool]:
        """Whether a sequence whose turn has come may be admitted: all of its tokens so far find pages beside those that the
        prompts being read will take, and a page for each running sequence. Snapshots give way; alone, a sequence always may.
        """
        scheduler, pages = self._scheduler, self._pages
        pledged = sum(map(self._lacks, scheduler.prompts)) + len(scheduler.running)
        alone = not scheduler.prompts and not scheduler.running

        def fits(sequence: Sequence) -> bool:
            nonlocal pledged, alone
            wanted = self._lacks(sequence)
            while not alone and wanted + pledged > pages.free:
                if not self._cache.drop_oldest():
                    return False
            pledged, alone = pledged + wanted, False
            return True

        return fits

    def _lacks(self, sequence: Sequence) -> int:
        held = len(sequence.state.held.pages) if isinstance(sequence.state, StoredState) else 0
        return max(0, pages_of(said(sequence) + 1) - held) + 1

    def _taken_by(self, sequence: Sequence, count: int) -> int:
        """Pages that a prompt's state takes when `count` more of its tokens are read."""
        after = len(sequence.request.history) + sequence.read + count
        shared = int(sequence.state.tokens) // PAGE if isinstance(sequence.state, StoredState) else 0
        return pages_of(after) - shared

    def _shrink(self, sequence: Sequence) -> bool:
        """Free some pages for a sequence: the oldest snapshot's, those of one that waits, or of the youngest of those that
        came after it. False if there are none."""
        if self._cache.drop_oldest():
            return True
        after, waiting, younger = False, None, None
        for other in self._sequences():
            if other is sequence:
                after = True
            elif other.stage is Stage.WAITING and isinstance(other.state, StoredState):
                waiting = other
            elif after and (other.stage is Stage.RUNNING or isinstance(other.state, StoredState)):
                younger = other
        victim = waiting or younger
        if victim is not None:
            self._swap_out(victim)
        return victim is not None
