"""Which sessions there are, by owner and name, which are in a file, and who is at work in which.

A session is one caller's at a time. What the store does with it by itself (`moving`) is waited for, a request is not.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Iterable

from mamba3.engine.session import Session
from mamba3.engine.session_errors import SessionBusy, TooManySessions, UnknownSession
from mamba3.engine.session_files import Key, SessionInfo
from mamba3.engine.session_memory import SessionMemory

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class SessionRegister:
    """`changed` guards everything here, and the memory; it is held for looking things up, never for a file.

    share: of sessions, as many as one owner may have. parked: what is in files, sessions in memory included.
    """

    def __init__(self, memory: SessionMemory, share: int, files: Iterable[tuple[Key, SessionInfo]] = ()):
        self.changed = threading.Condition()
        self.parked: dict[Key, SessionInfo] = {}
        self.in_use: set[Key] = set()
        self.moving: set[Key] = set()  # in use by the store itself, for a moment
        self._memory, self._share = memory, share
        self._names: dict[str, set[str]] = {}  # by place
        for key, info in files:
            self.parked[key] = info
            self._names.setdefault(key.place, set()).add(key.id)

    def __len__(self) -> int:
        with self.changed:
            return sum(map(len, self._names.values()))

    def list(self, place: str) -> list[SessionInfo]:
        """An owner's sessions, by name."""
        with self.changed:
            found = [self._look_up(Key(place, name)) for name in sorted(self._names.get(place, ()))]
        return [info for info in found if info is not None]

    def known(self, key: Key) -> SessionInfo:
        """What is known of a session. Raises UnknownSession."""
        with self.changed:
            info = self._look_up(key)
        if info is None:
            raise UnknownSession(f"There is no session {key.id!r}.")
        return info

    def begin(self, key: Key) -> None:
        """Have the session for oneself; called under the lock. Raises UnknownSession and SessionBusy."""
        while key in self.moving:
            self.changed.wait()
        self.known(key)
        if key in self.in_use:
            raise SessionBusy(f"A request is under way in session {key.id!r}; wait for its end, or fork the session.")
        self.in_use.add(key)

    def end(self, key: Key) -> None:
        """Let others have the session."""
        with self.changed:
            self.in_use.discard(key)
            self.moving.discard(key)
            self.changed.notify_all()

    def reserve(self, session: Session, id: str | None) -> Key:
        """A free name for a session that is being made, which is in use from then on; called under the lock.

        ValueError for a name that is taken or that is none, TooManySessions.
        """
        name = f"session-{secrets.token_hex(8)}" if id is None else id
        if not _NAME.fullmatch(name):
            raise ValueError(f"A session's name has 1 to 64 letters, digits, - or _; it is {name!r}.")
        key = Key.of(session.owner, name)
        names = self._names.get(key.place, set())
        if len(names) >= self._share:
            raise TooManySessions(f"You have {len(names)} sessions, and may have {self._share}; delete some.")
        if name in names:
            raise ValueError(f"There is a session {name!r} already; choose another name, or delete it.")
        self._names.setdefault(key.place, set()).add(name)
        self.in_use.add(key)
        return key

    def forget(self, key: Key) -> None:
        """There is no such session any more, in memory or in a file; called under the lock."""
        self._memory.pop(key)
        self.parked.pop(key, None)
        self._names[key.place].discard(key.id)
        if not self._names[key.place]:
            del self._names[key.place]

    def _look_up(self, key: Key) -> SessionInfo | None:
        return self._memory.info(key) or self.parked.get(key)
