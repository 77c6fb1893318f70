"""Folders that one process at a time may write: of a run, of a server's sessions."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """The folder, made where there was none, for this process alone; it goes again if nothing was put into it.

    Raises ValueError where another process has it. The lock is advisory and ends with the process, however that ends; where
    the system or the file system has no locks (Windows, some network ones) nothing is held.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"one process at a time may write a folder, but another one is writing {folder}; wait for its end, stop it, or "
                "give another folder."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):  # it is not empty: what was to be there is
                folder.rmdir()
