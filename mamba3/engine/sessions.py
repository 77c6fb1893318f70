"""Sessions by name: in memory up to a budget of bytes, in files beyond it and after the process has ended.

Law: a call that changes a session does so whole or not at all, and what it returned from is in the file: whatever is raised
on the way, a full disk included, leaves session and file as they were. Owners' sessions are apart: to one, those of another
do not exist, and what one holds takes no place from the others (`owners`).
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mamba3.engine import session_files
from mamba3.engine.session import Session
from mamba3.engine.session_errors import SessionMemoryFull, SessionNotSaved
from mamba3.engine.session_files import Key, SessionFiles, SessionInfo
from mamba3.engine.session_memory import SessionMemory
from mamba3.engine.session_register import SessionRegister
from mamba3.lm import Mamba3LM

_log = logging.getLogger(__name__)


class Lease(NamedTuple):
    """A session that is in use, and what it was when that began."""

    session: Session
    before: Session


class SessionStore:
    """Safe to use from several threads; no file is read or written while others wait for an answer about other sessions.

    folder: for files; None: sessions live in memory alone. budget: bytes of sessions in memory. Beyond it, those of the owner
    that holds most, least recently used first, are parked; without a folder their states are given up instead, earliest
    turns first, and what those spared is read again. Tokens and texts are never given up: without a folder, each of `owners`
    has an equal share of the budget for them, and what would exceed it raises SessionMemoryFull.
    keep_turns: states kept of each session, one for each of its last turns. dtype: of the matrix states in files
    (torch.bfloat16 halves them; what that costs is in docs/serving.md). limit: of sessions, of which each of `owners` has an
    equal share too. save_turns: write each change before the call returns; otherwise when a session is parked.
    """

    def __init__(
        self,
        model: Mamba3LM,
        folder: str | Path | None = None,
        *,
        budget: int = 2**30,
        keep_turns: int = 8,
        dtype: torch.dtype | None = None,
        limit: int = 100_000,
        owners: int = 1,
        save_turns: bool = True,
    ):
        self.model, self.budget, self.keep_turns = model, budget, keep_turns
        self._dtype, self._owners = dtype, owners
        self._files = None if folder is None else SessionFiles(model, Path(folder), dtype)
        self._saves = save_turns and folder is not None
        self._memory = SessionMemory(whole=folder is not None)
        known = () if self._files is None else self._files.find()
        self._register = SessionRegister(self._memory, max(1, limit // owners), known)
        self._changed, self._making_room = self._register.changed, threading.Lock()

    # -- all sessions

    def __len__(self) -> int:
        return len(self._register)

    @property
    def has_folder(self) -> bool:
        """Whether sessions can be written to files."""
        return self._files is not None

    @property
    def resident(self) -> int:
        """Sessions in memory."""
        return len(self._memory)

    @property
    def nbytes(self) -> int:
        """Bytes of sessions in memory: states (those that forks share count once), tokens, texts."""
        return self._memory.nbytes

    def list(self, owner: str) -> list[SessionInfo]:
        """The owner's sessions, by name."""
        return self._register.list(Key.of(owner, "").place)

    def park_all(self) -> None:
        """Write every session that is in memory to its file: before the process ends. What cannot be is logged."""
        with self._changed:
            idle = [key for key in self._memory.keys() if key not in self._register.in_use]  # noqa: SIM118 (not a dict)
        for key in idle if self._files is not None else ():
            try:
                self._park(key)
            except Exception:  # noqa: BLE001 (the others can be, perhaps)
                _log.exception("a session could not be parked; what it said since it was last written is lost")

    # -- one session

    def create(self, owner: str = "", id: str | None = None) -> SessionInfo:
        """A session without a past. ValueError for a name that is taken or that is none, TooManySessions,
        SessionMemoryFull, SessionNotSaved."""
        return self._add(Session("", owner), id)

    def info(self, owner: str, id: str) -> SessionInfo:
        """As things stood when the last request in the session ended. Raises UnknownSession."""
        return self._register.known(Key.of(owner, id))

    @contextmanager
    def use(self, owner: str, id: str) -> Iterator[Session]:
        """The session, loaded if it was parked, for this caller alone; whatever is raised leaves it as it was.

        Raises UnknownSession, SessionBusy, ValueError when its file is damaged or of other weights, and at the end what
        `commit` raises.
        """
        lease = self.take(owner, id)
        try:
            yield lease.session
        except BaseException:
            self.roll_back(lease)
            raise
        self.commit(lease)

    def take(self, owner: str, id: str) -> Lease:
        """The beginning of `use`."""
        key = Key.of(owner, id)
        with self._changed:
            self._register.begin(key)
            session = self._memory.get(key)
        if session is None:
            try:
                assert self._files is not None
                session = self._files.read(key, owner)
            except BaseException:
                self._register.end(key)
                raise
            with self._changed:
                self._memory.put(key, session)
        return Lease(session, session.copy())

    def commit(self, lease: Lease) -> None:
        """The end of `use` that keeps what was done. Raises SessionNotSaved and SessionMemoryFull, and keeps nothing then."""
        session, before = lease
        try:
            if session.differs(before):
                with self._changed:  # no two sessions take the same room
                    self.check_memory(session.owner, session.record_bytes - before.record_bytes)
                    self._count_at_once(session)
                if self._saves:
                    self._write(session)
        except BaseException:
            self.roll_back(lease)
            raise
        self._give_back(session)

    def roll_back(self, lease: Lease) -> None:
        """The end of `use` that leaves the session as it was."""
        lease.session.restore(lease.before)
        self._give_back(lease.session)

    def check_memory(self, owner: str, more: int = 1) -> None:
        """SessionMemoryFull when so many more bytes of tokens and texts do not fit into the owner's share."""
        held, share = self._memory.records(Key.of(owner, "").place), self.budget // self._owners
        if self._files is None and more > 0 and held + more > share:
            raise SessionMemoryFull(
                f"The tokens and texts of your sessions may take {share // 1024} KiB of memory; {held // 1024} KiB are taken, "
                f"and {-(-more // 1024)} KiB more do not fit. Delete sessions or rewind them; whoever runs the server can "
                "give them more memory (--session-mib) or a folder to park in (--sessions)."
            )

    def fork(self, owner: str, id: str, new: str | None = None, turn: int | None = None) -> SessionInfo:
        """Another session with the same past, up to a turn if one is given."""
        lease = self.take(owner, id)
        try:
            twin = lease.session.fork("")
            if turn is not None and turn != len(twin.turns):
                twin.rewind(turn)
            return self._add(twin, new, lease.session)
        finally:
            self.roll_back(lease)

    def rewind(self, owner: str, id: str, turn: int) -> SessionInfo:
        """Forget what came after a turn."""
        with self.use(owner, id) as session:
            session.rewind(turn)
        return self.info(owner, id)

    def delete(self, owner: str, id: str) -> None:
        """Forget the session, its file too."""
        key = Key.of(owner, id)
        with self._changed:
            self._register.begin(key)
        try:
            if self._files is not None:
                self._files.delete(key)
            with self._changed:
                self._register.forget(key)
        finally:
            self._register.end(key)

    def park(self, owner: str, id: str) -> SessionInfo:
        """Write the session to its file and take it out of memory. SessionNotSaved when that fails: it stays as it was."""
        key = Key.of(owner, id)
        self._need_folder()
        self._park(key)
        return self._register.known(key)

    def save(self, owner: str, id: str) -> None:
        """Write the session to its file and keep it in memory."""
        self._need_folder()
        with self.use(owner, id) as session:
            if not session.saved:
                self._write(session)

    def dump(self, session: Session) -> bytes:
        """A session that is in use as the bytes of a file."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "session"
            session_files.write(session, path, self.model, self._dtype)
            return path.read_bytes()

    def export(self, owner: str, id: str) -> bytes:
        """The session as the bytes of a file, for `import_` here or in another process."""
        with self.use(owner, id) as session:
            return self.dump(session)

    def import_(self, data: bytes | Path, owner: str = "", id: str | None = None) -> SessionInfo:
        """A session from exported bytes, or from a file of them, under a new name unless one is given. ValueError says what
        is wrong with them."""
        self.check_memory(owner)
        if isinstance(data, Path):
            return self._add(session_files.read(data, self.model, owner, "The data"), id)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "session"
            path.write_bytes(data)
            return self.import_(path, owner, id)

    # -- sessions in and out

    def _add(self, session: Session, id: str | None, source: Session | None = None) -> SessionInfo:
        """Let a new session be there, in its file too; source: of which it is a copy, and which is in use."""
        with self._changed:
            key = self._register.reserve(session, id)
        session.id = key.id
        try:
            with self._changed:  # no two sessions take the same room
                self.check_memory(session.owner, session.record_bytes)
                self._count_at_once(session)
            if self._saves:
                self._write(session, source)
            with self._changed:
                self._memory.put(key, session)
        except BaseException:
            with self._changed:
                self._register.forget(key)
            raise
        finally:
            self._register.end(key)
        self._make_room()
        return self._register.known(key)

    def _count_at_once(self, session: Session) -> None:
        """Where memory is all there is, what was found to fit takes its room before anyone else looks."""
        if self._files is None:
            self._memory.put(Key.of(session.owner, session.id), session)

    def _write(self, session: Session, source: Session | None = None) -> None:
        """Let the session's file say what the session says."""
        assert self._files is not None
        key = Key.of(session.owner, session.id)
        info = self._link(session, source)
        if info is None:
            try:
                info = self._files.write(session)
            except OSError as error:
                _log.error("a session could not be written: %s", error)
                raise SessionNotSaved(
                    f"Session {session.id!r} could not be written to its file ({error.strerror}); nothing was changed."
                ) from error
        session.saved = True
        with self._changed:
            self._register.parked[key] = info

    def _link(self, session: Session, source: Session | None) -> SessionInfo | None:
        """The file of a session that begins as another one: the same file, where that says the same."""
        if source is None or not source.saved or session.differs(source):
            return None
        assert self._files is not None
        old, new = Key.of(source.owner, source.id), Key.of(session.owner, session.id)
        try:
            self._files.link(old, new)
        except OSError:  # not every file system can
            return None
        with self._changed:
            return replace(self._register.parked[old], id=new.id)

    def _give_back(self, session: Session) -> None:
        key = Key.of(session.owner, session.id)
        with self._changed:
            self._memory.put(key, session)
        self._register.end(key)
        self._make_room()

    def _park(self, key: Key) -> None:
        with self._changed:
            self._register.begin(key)
            session = self._memory.get(key)
        try:
            if session is not None and not session.saved:
                self._write(session)
            with self._changed:
                self._memory.pop(key)
        finally:
            self._register.end(key)

    def _make_room(self) -> None:
        """Park, or give up, what is over the budget. What goes wrong there is of another session than the caller's: no error
        is raised."""
        if not self._making_room.acquire(blocking=False):
            return  # another thread is at it
        try:
            while self._let_go():
                pass
        except Exception:  # noqa: BLE001 (it stays in memory; the next call begins with another)
            _log.exception("a session could not be parked; memory stays over its budget")
        finally:
            self._making_room.release()

    def _let_go(self) -> bool:
        """Give something up if there is too much; whether there was."""
        with self._changed:
            victim = self._memory.first(lambda key: key not in self._register.in_use)
            if self._memory.nbytes <= self.budget or victim is None:
                return False
            key, session = victim
            if self._files is None:
                session.forget_state()
                self._memory.put(key, session, used=False)
                return True
            if session.saved:
                self._memory.pop(key)
                return True
            self._register.in_use.add(key)
            self._register.moving.add(key)
        try:
            self._write(session)
            with self._changed:
                self._memory.pop(key)
        finally:
            self._register.end(key)
        return True

    def _need_folder(self) -> None:
        if self._files is None:
            raise ValueError(
                "Parking needs a folder for sessions; give one to SessionStore (serve: --sessions FOLDER)."
            )
