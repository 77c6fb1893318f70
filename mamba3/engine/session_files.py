"""Files of sessions: one safetensors file each, with a checksum and the fingerprint of the weights, in a folder of its owner.

A file is written beside the old one and renamed into its place: a process that dies while it writes leaves the file of
before. No file is ever changed, so that a fork may begin as a second name of the same one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from mamba3.engine.session import Session
from mamba3.lm import Mamba3LM
from mamba3.ops import state_file

_KIND, _SUFFIX = "session", ".safetensors"
_log = logging.getLogger(__name__)


class Key(NamedTuple):
    """Which session: the place of its owner, and its name."""

    place: str
    id: str

    @classmethod
    def of(cls, owner: str, id: str) -> Key:
        """The place is a hash: no name or key of an owner is written down."""
        return cls(hashlib.blake2b(owner.encode(), digest_size=16).hexdigest(), id)


@dataclass(frozen=True)
class SessionInfo:
    """What can be said of a session without loading it. parked: it is in its file alone."""

    id: str
    tokens: int
    turns: int
    nbytes: int
    parked: bool


class SessionFiles:
    """The files in a folder. dtype: of the matrix states in them; None: as they are."""

    def __init__(self, model: Mamba3LM, folder: Path, dtype: torch.dtype | None):
        self._model, self._folder, self._dtype = model, folder, dtype
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, session: Session) -> SessionInfo:
        """Write the session to its file. OSError when that fails: the file is what it was before."""
        path = self._path(Key.of(session.owner, session.id))
        path.parent.mkdir(exist_ok=True)
        write(session, path, self._model, self._dtype)
        return SessionInfo(session.id, len(session.tokens), len(session.turns), path.stat().st_size, True)

    def link(self, old: Key, new: Key) -> None:
        """Give the file of a session to another one too. OSError where the file system cannot."""
        os.link(self._path(old), self._path(new))

    def read(self, key: Key, owner: str) -> Session:
        """The session in a file. ValueError when the file is damaged, gone or of other weights."""
        session = read(self._path(key), self._model, owner, f"The file of session {key.id!r}")
        session.id, session.saved = key.id, True
        return session

    def delete(self, key: Key) -> None:
        """Forget the file, if there is one."""
        self._path(key).unlink(missing_ok=True)

    def find(self) -> Iterator[tuple[Key, SessionInfo]]:
        """The sessions that have files, by what these say of themselves; what a dead process left half written goes."""
        for place in sorted(path for path in self._folder.iterdir() if path.is_dir()):
            for leftover in place.glob(f".*{_SUFFIX}.*"):
                leftover.unlink(missing_ok=True)
            for path in sorted(place.glob(f"*{_SUFFIX}")):
                name = path.name.removesuffix(_SUFFIX)
                try:
                    facts = state_file.metadata(path)
                    tokens, turns = int(facts["tokens"]), int(facts["turns"])
                except (ValueError, KeyError) as error:
                    _log.warning("%s is no session and is left alone: %s", path.name, error)
                    continue
                yield Key(place.name, name), SessionInfo(name, tokens, turns, path.stat().st_size, True)

    def _path(self, key: Key) -> Path:
        return self._folder / key.place / f"{key.id}{_SUFFIX}"


def write(session: Session, path: Path, model: Mamba3LM, dtype: torch.dtype | None) -> None:
    """Write a session to any file."""
    facts = {"tokens": str(len(session.tokens)), "turns": str(len(session.turns))}
    state_file.write(path, session.tensors(dtype), kind=_KIND, fingerprint=model.fingerprint(), **facts)


def read(path: Path, model: Mamba3LM, owner: str, what: str) -> Session:
    """The session in any file. ValueError says what is wrong with it and calls it by `what`, not by its path."""
    try:
        tensors, metadata = state_file.read(path, kind=_KIND)
    except FileNotFoundError as error:
        raise ValueError(f"{what} is gone.") from error
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), what)) from error
    if metadata.get("fingerprint") != model.fingerprint():
        raise ValueError(
            f"{what} was made by other weights ({metadata.get('fingerprint')}, these are {model.fingerprint()}); "
            "serve the model that made it."
        )
    return Session.from_tensors(tensors, model, owner)
