"""torch.compile with a time limit: a contestant that does not compile, or not in time, is left out and the reason noted."""

from __future__ import annotations

import contextlib
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def try_compile(make: Callable[[], T], warm: Callable[[T], Any], limit_s: float) -> tuple[T | None, dict[str, Any]]:
    """What `make` returned once `warm` has called, and so compiled, it; None when that failed. And a note for the results."""
    start = time.perf_counter()
    try:
        with time_limit(limit_s), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.13's inductor warns of its own functions
            made = make()
            warm(made)
    except (RuntimeError, TimeoutError) as error:
        late = time.perf_counter() - start >= limit_s
        why = f"not done after {limit_s:.0f} s" if late else f"{type(error).__name__}: {error}".splitlines()[0]
        return None, {"compiled": False, "why": why}
    return made, {"compiled": True, "seconds": round(time.perf_counter() - start, 1)}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after `seconds`, again every second after that until it is heard."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
