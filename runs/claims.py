"""Several processes that fill one folder: each cell is one process's, each file is whole, a killed process leaves nothing.

A claim is a lock that the system holds for a process (flock), so that it ends with the process however that ends; the empty
file that it is of stays and means nothing. Processes may be started by one command (`Workers`) or by several.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch


def _locked(place: Path, *, wait: bool) -> int | None:
    place.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


@contextmanager
def claim(place: Path) -> Iterator[bool]:
    """Whether what the file `place` stands for is this process's to do; it is nobody else's until the block ends."""
    handle = _locked(place, wait=False)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """One process at a time runs the block: read a shared file, change it, replace it."""
    handle = _locked(place, wait=True)
    assert handle is not None
    try:
        yield
    finally:
        os.close(handle)


def devices(kind: str) -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES chooses each GPU that this process sees; none where it is to run on a CPU."""
    if kind == "cpu":
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


class Workers:
    """The processes of `count` more of this command, worker i on GPU i (of `gpus`, again from the first when they are used up).

    What a worker prints goes to OUT/worker-i.log. `wait` passes SIGINT and SIGTERM on, so that each saves what it began. A
    worker whose command was killed ends as if it had been told to (`orphaned`).
    """

    def __init__(self, arguments: Sequence[str], count: int, gpus: Sequence[str], out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self.logs = [out / f"worker-{i}.log" for i in range(count)]
        self.children: list[subprocess.Popen] = []
        for i, log in enumerate(self.logs):
            seen = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}
            command = [sys.executable, *arguments, "--worker", str(os.getpid())]
            with log.open("ab") as file:
                streams = {"stdout": file, "stderr": file}
                self.children.append(
                    subprocess.Popen(command, env=os.environ | seen, start_new_session=True, **streams)
                )

    def wait(self) -> list[Path]:
        """Until all have ended; the logs of those that failed."""

        def pass_on(number: int, _: object) -> None:
            for child in self.children:
                if child.poll() is None:
                    child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while any(child.poll() is None for child in self.children):
                time.sleep(0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return [log for log, child in zip(self.logs, self.children, strict=True) if child.returncode]


def orphaned(parent: int | None) -> bool:
    """Whether the command that started this worker is gone."""
    return parent is not None and os.getppid() != parent
