"""Sessions by name: in memory up to a budget of bytes, in files beyond it and after the process has ended.

A file holds one session (`engine.session`): safetensors with a checksum and the fingerprint of the weights, written beside
the old one and renamed into its place: a process that dies while it writes leaves the file of before. Owners have folders
of their own; to one, the sessions of another do not exist.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mamba3.engine.session import Session
from mamba3.lm import Mamba3LM
from mamba3.ops import state_file

_KIND, _SUFFIX = "session", ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_log = logging.getLogger(__name__)


class UnknownSession(LookupError):
    """There is no such session, or it is another owner's."""


class SessionBusy(RuntimeError):
    """A request is under way in the session; wait for its end."""


class TooManySessions(RuntimeError):
    """No more sessions fit; delete some."""


@dataclass(frozen=True)
class SessionInfo:
    """What can be said of a session without loading it. parked: it is in its file alone."""

    id: str
    tokens: int
    turns: int
    nbytes: int
    parked: bool


class SessionStore:
    """Safe to use from several threads.

    folder: for files; None: sessions live in memory alone. budget: bytes of states in memory, beyond which the least
    recently used sessions are parked. keep_turns: states kept of each session, one for each of its last turns. dtype: of
    the matrix states in files (torch.bfloat16 halves them; what that costs is in docs/serving.md). limit: of sessions.
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
    ):
        self.model, self.budget, self.keep_turns, self.dtype, self.limit = model, budget, keep_turns, dtype, limit
        self._folder = None if folder is None else Path(folder)
        self._lock = threading.RLock()
        self._resident: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self._files: dict[tuple[str, str], SessionInfo] = {}  # by folder of the owner and id
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._find_files()

    # -- all sessions

    def __len__(self) -> int:
        with self._lock:
            return len(self._resident.keys() | self._files.keys())

    @property
    def has_folder(self) -> bool:
        """Whether sessions can be written to files."""
        return self._folder is not None

    @property
    def resident(self) -> int:
        """Sessions in memory."""
        return len(self._resident)

    @property
    def nbytes(self) -> int:
        """Bytes of states in memory; those that forks share count once."""
        with self._lock:
            states = {id(s): s.nbytes for session in self._resident.values() for s in session.states.values()}
            return sum(states.values())

    def list(self, owner: str) -> list[SessionInfo]:
        """The owner's sessions, by name."""
        place = _place(owner)
        with self._lock:
            names = sorted(name for where, name in self._resident.keys() | self._files.keys() if where == place)
            return [self.info(owner, name) for name in names]

    def park_all(self) -> None:
        """Write every session that is in memory to its file: before the process ends."""
        with self._lock:
            sessions = [session for session in self._resident.values() if not session.busy]
        for session in sessions if self._folder is not None else ():
            self.park(session.owner, session.id)

    # -- one session

    def create(self, owner: str = "", id: str | None = None) -> SessionInfo:
        """A session without a past. ValueError for a name that is taken or that is none, TooManySessions."""
        with self._lock:
            self._add(Session(self._free_name(owner, id), owner))
            return self.info(owner, next(reversed(self._resident))[1])

    def info(self, owner: str, id: str) -> SessionInfo:
        """Raises UnknownSession."""
        with self._lock:
            session = self._resident.get((_place(owner), id))
            if session is not None:
                return SessionInfo(id, len(session.tokens), len(session.turns), session.nbytes, False)
            if (_place(owner), id) in self._files:
                return self._files[_place(owner), id]
        raise UnknownSession(f"There is no session {id!r}.")

    @contextmanager
    def use(self, owner: str, id: str) -> Iterator[Session]:
        """The session, loaded if it was parked, for this caller alone. Raises UnknownSession, SessionBusy, and
        ValueError when its file is damaged or of other weights."""
        session = self._take(owner, id)
        try:
            yield session
        finally:
            with self._lock:
                session.busy = False
        self._make_room()

    def fork(self, owner: str, id: str, new: str | None = None, turn: int | None = None) -> SessionInfo:
        """Another session with the same past, up to a turn if one is given."""
        with self.use(owner, id) as session, self._lock:
            twin = session.fork(self._free_name(owner, new))
            if turn is not None:
                twin.rewind(turn)
            self._add(twin)
        return self.info(owner, twin.id)

    def rewind(self, owner: str, id: str, turn: int) -> SessionInfo:
        """Forget what came after a turn."""
        with self.use(owner, id) as session:
            session.rewind(turn)
        return self.info(owner, id)

    def delete(self, owner: str, id: str) -> None:
        """Forget the session, its file too."""
        key = (_place(owner), id)
        with self._lock:
            self.info(owner, id)
            if key in self._resident and self._resident[key].busy:
                raise SessionBusy(f"A request is under way in session {id!r}; wait for its end.")
            self._resident.pop(key, None)
            if self._files.pop(key, None) is not None:
                self._path(owner, id).unlink(missing_ok=True)

    def park(self, owner: str, id: str) -> SessionInfo:
        """Write the session to its file and take it out of memory. OSError when that fails: it stays as it was."""
        if self._folder is None:
            raise ValueError(
                "Parking needs a folder for sessions; give one to SessionStore (serve: --sessions FOLDER)."
            )
        key = (_place(owner), id)
        with self._lock:
            if key not in self._resident and key in self._files:
                return self._files[key]
        session = self._take(owner, id)
        try:
            info = self.write(session)
            with self._lock:
                self._resident.pop(key, None)
        finally:
            session.busy = False
        return info

    def save(self, owner: str, id: str) -> None:
        """Write the session to its file and keep it in memory."""
        with self.use(owner, id) as session:
            self.write(session)

    def write(self, session: Session) -> SessionInfo:
        """Write a session that is in use to its file. OSError when that fails: the file is what it was before."""
        if self._folder is None:
            raise ValueError(
                "Parking needs a folder for sessions; give one to SessionStore (serve: --sessions FOLDER)."
            )
        path = self._path(session.owner, session.id)
        path.parent.mkdir(exist_ok=True)
        self._write(session, path)
        info = SessionInfo(session.id, len(session.tokens), len(session.turns), path.stat().st_size, True)
        with self._lock:
            self._files[_place(session.owner), session.id] = info
        return info

    def export(self, owner: str, id: str) -> bytes:
        """The session as the bytes of a file, for `import_` here or in another process."""
        with self.use(owner, id) as session, tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "session"
            self._write(session, path)
            return path.read_bytes()

    def import_(self, data: bytes, owner: str = "", id: str | None = None) -> SessionInfo:
        """A session from exported bytes, under a new name unless one is given. ValueError says what is wrong with them."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "session"
            path.write_bytes(data)
            session = self._read(path, owner, "The data")
        with self._lock:
            session.id = self._free_name(owner, id)
            self._add(session)
        self._make_room()
        return self.info(owner, session.id)

    # -- inside

    def _take(self, owner: str, id: str) -> Session:
        key = (_place(owner), id)
        with self._lock:
            session = self._resident.get(key)
            if session is None:
                self.info(owner, id)
                session = self._read(self._path(owner, id), owner, f"The file of session {id!r}")
                session.id = id
                self._resident[key] = session
            if session.busy:
                raise SessionBusy(f"A request is under way in session {id!r}; wait for its end, or fork the session.")
            session.busy = True
            self._resident.move_to_end(key)
            return session

    def _make_room(self) -> None:
        """Park what is over the budget. What goes wrong there is of another session than the caller's: no error is raised."""
        while self._folder is not None and self.nbytes > self.budget:
            with self._lock:
                idle = next((s for s in self._resident.values() if not s.busy and s.states), None)
            if idle is None:
                return
            try:
                self.park(idle.owner, idle.id)
            except (SessionBusy, UnknownSession):  # a request came between, or its end
                continue
            except Exception:  # noqa: BLE001 (it stays in memory; the next call begins with another)
                _log.exception("a session could not be parked; memory stays over its budget")
                return

    def _add(self, session: Session) -> None:
        self._resident[_place(session.owner), session.id] = session

    def _free_name(self, owner: str, id: str | None) -> str:
        if len(self) >= self.limit:
            raise TooManySessions(f"There are {len(self)} sessions, and no more are kept; delete some.")
        name = f"session-{secrets.token_hex(8)}" if id is None else id
        if not _NAME.fullmatch(name):
            raise ValueError(f"A session's name has 1 to 64 letters, digits, - or _; it is {name!r}.")
        if (_place(owner), name) in self._resident.keys() | self._files.keys():
            raise ValueError(f"There is a session {name!r} already; choose another name, or delete it.")
        return name

    def _path(self, owner: str, id: str) -> Path:
        assert self._folder is not None
        return self._folder / _place(owner) / f"{id}{_SUFFIX}"

    def _write(self, session: Session, path: Path) -> None:
        facts = {"tokens": str(len(session.tokens)), "turns": str(len(session.turns))}
        fingerprint = self.model.fingerprint()
        state_file.write(path, session.tensors(self.dtype), kind=_KIND, fingerprint=fingerprint, **facts)

    def _read(self, path: Path, owner: str, what: str) -> Session:
        try:
            tensors, metadata = state_file.read(path, kind=_KIND)
        except FileNotFoundError as error:
            raise ValueError(f"{what} is gone.") from error
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), what)) from error
        if metadata.get("fingerprint") != self.model.fingerprint():
            raise ValueError(
                f"{what} was made by other weights ({metadata.get('fingerprint')}, these are {self.model.fingerprint()}); "
                "serve the model that made it."
            )
        return Session.from_tensors(tensors, self.model, owner)

    def _find_files(self) -> None:
        assert self._folder is not None
        for place in sorted(path for path in self._folder.iterdir() if path.is_dir()):
            for leftover in place.glob(f".*{_SUFFIX}.*"):  # of a process that died while it wrote
                leftover.unlink(missing_ok=True)
            for path in sorted(place.glob(f"*{_SUFFIX}")):
                name = path.name.removesuffix(_SUFFIX)
                try:
                    facts = state_file.metadata(path)
                    tokens, turns = int(facts["tokens"]), int(facts["turns"])
                except (ValueError, KeyError) as error:
                    _log.warning("%s is no session and is left alone: %s", path.name, error)
                    continue
                self._files[place.name, name] = SessionInfo(name, tokens, turns, path.stat().st_size, True)


def _place(owner: str) -> str:
    """The folder of an owner: no name or key of theirs is written down."""
    return hashlib.blake2b(owner.encode(), digest_size=16).hexdigest()
