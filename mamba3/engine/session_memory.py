"""Sessions in memory: how many bytes they are, whose, and who goes first when they are too many.

A state that forks share counts once. When there is too much, it is the owner who holds most that gives something up, of the
session that it has not used for longest: one who holds little loses nothing to one who holds much.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from mamba3.engine.session import Session
from mamba3.engine.session_files import Key, SessionInfo
from mamba3.lm import LMState


class _Entry(NamedTuple):
    session: Session
    info: SessionInfo
    record_bytes: int
    states: tuple[LMState, ...]  # held here too, so that no other object gets the id that one is counted by


class SessionMemory:
    """Not for several threads at once. whole: whether a whole session can go, or its states alone."""

    def __init__(self, *, whole: bool):
        self.nbytes, self._whole = 0, whole
        self._entries: dict[Key, _Entry] = {}
        self._order: dict[str, OrderedDict[Key, None]] = {}  # by place: what can go, least recently used first
        self._owned: Counter[str] = Counter()  # bytes by place
        self._records: Counter[str] = Counter()  # of these, bytes that are no states
        self._sharers: Counter[int] = Counter()  # sessions by state

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Session | None:
        """The session, if it is in memory."""
        entry = self._entries.get(key)
        return None if entry is None else entry.session

    def info(self, key: Key) -> SessionInfo | None:
        """What was so when the session was last counted: a turn that is under way does not show."""
        entry = self._entries.get(key)
        return None if entry is None else entry.info

    def records(self, place: str) -> int:
        """Bytes of an owner's sessions that are no states."""
        return self._records[place]

    def put(self, key: Key, session: Session, *, used: bool = True) -> None:
        """Count the session as it is now. used: it was, and goes last."""
        self._uncount(key)
        info = SessionInfo(session.id, len(session.tokens), len(session.turns), session.nbytes, False)
        entry = self._entries[key] = _Entry(session, info, session.record_bytes, tuple(session.states.values()))
        self._records[key.place] += entry.record_bytes
        self._add(key.place, entry.record_bytes)
        for state in entry.states:
            self._sharers[id(state)] += 1
            if self._sharers[id(state)] == 1:
                self._add(key.place, state.nbytes)
        order = self._order.setdefault(key.place, OrderedDict())
        if self._whole or session.states:
            order[key] = None
            if used:
                order.move_to_end(key)
        else:
            self._leave_order(key)

    def pop(self, key: Key) -> None:
        """Forget the session, if it is in memory."""
        self._uncount(key)
        self._leave_order(key)
        self._entries.pop(key, None)

    def first(self, idle: Callable[[Key], bool]) -> tuple[Key, Session] | None:
        """What goes first, of those that are idle."""
        for place in sorted(self._order, key=lambda place: -self._owned[place]):
            for key in self._order[place]:
                if idle(key):
                    return key, self._entries[key].session
        return None

    def _uncount(self, key: Key) -> None:
        entry = self._entries.get(key)
        if entry is None:
            return
        self._records[key.place] -= entry.record_bytes
        self._add(key.place, -entry.record_bytes)
        for state in entry.states:
            self._sharers[id(state)] -= 1
            if not self._sharers[id(state)]:
                del self._sharers[id(state)]
                self._add(key.place, -state.nbytes)

    def _add(self, place: str, count: int) -> None:
        self.nbytes += count
        self._owned[place] += count

    def _leave_order(self, key: Key) -> None:
        order = self._order.get(key.place, {})
        order.pop(key, None)
        if not order:
            self._order.pop(key.place, None)

    def keys(self) -> list[Key]:
        """All sessions in memory."""
        return list(self._entries)
