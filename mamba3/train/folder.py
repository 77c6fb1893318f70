"""A folder that a kill or a full disk cannot leave half written: filled beside its place, then renamed into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill: it appears as `path`, on disk in full, when the block ends, and not at all if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _before(path).exists() and not path.exists():  # a kill came between the two renames of `publish`
        os.replace(_before(path), path)
    for abandoned in path.parent.glob(".*.tmp"):  # of a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = temporary_of(path)
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_of(path: Path) -> Path:
    """Where the folder that will be `path` is filled."""
    return path.with_name(f".{path.name}.tmp")


def _before(path: Path) -> Path:
    """Where the folder that was `path` is while another takes its place."""
    return path.with_name(f".{path.name}.before")


def publish(temporary: Path, path: Path) -> None:
    """Bring a filled folder to the disk in full, then rename it to `path`; one that is there is removed after that."""
    for file in (*temporary.rglob("*"), temporary):
        _sync(file)
    shutil.rmtree(_before(path), ignore_errors=True)
    if path.exists():
        os.replace(path, _before(path))
    os.replace(temporary, path)
    _sync(path.parent)
    shutil.rmtree(_before(path), ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
