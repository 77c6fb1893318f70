"""Ctrl-C as a request: finish what is under way, keep it, then leave."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mamba3.cli.console import errors

INTERRUPTED = 130  # exit code of a command that was stopped by Ctrl-C


@contextmanager
def stop_on_interrupt(announcement: str) -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C (or SIGTERM) only makes the yielded function true; the second one interrupts."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        errors.print(f"[dim]{announcement} (Ctrl-C again stops at once)[/]")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
