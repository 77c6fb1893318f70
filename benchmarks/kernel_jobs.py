"""What is done in processes of its own before any time is taken: checks, cold starts, and other projects' compilation.

    python -m benchmarks.kernel_jobs KIND SETTINGS FILE        writes its result, and what it has on the way, to FILE as JSON

What a process prints is its libraries' own affair: some log to the standard output.

Kernels compile for seconds to minutes on one core each; a process a piece of work puts all cores to use.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mamba3.ops.state_file import replace_file

ROOT = Path(__file__).parents[1]


class Job(NamedTuple):
    """A kind of work, its settings, and the folder of compiled kernels it uses (None: the user's own)."""

    kind: str
    settings: dict[str, Any]
    cache: str | None = None


class Outcome(NamedTuple):
    """The last result that the process wrote, and why it is not all."""

    result: Any
    why: str | None


def run_all(jobs: Mapping[str, Job], limit_s: float, workers: int, tell: Callable[[str], None]) -> dict[str, Outcome]:
    """Every job in a process of its own, `workers` at a time, in `limit_s` seconds for all together: what is then not done is
    ended, and what has not begun is not begun."""
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + limit_s
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(_run, job, deadline): name for name, job in jobs.items()}
        for done in concurrent.futures.as_completed(running):
            name, outcomes[running[done]] = running[done], done.result()
            tell(f"{name}: {outcomes[name].why or 'done'}")
    return outcomes


def _run(job: Job, deadline: float) -> Outcome:
    limit_s = deadline - time.monotonic()
    if limit_s <= 0:
        return Outcome(None, "not begun in the time for all")
    cache, why = {} if job.cache is None else {"TRITON_CACHE_DIR": job.cache}, None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.kernel_jobs", job.kind, json.dumps(job.settings), str(file)]
        try:
            done = subprocess.run(
                command, env=os.environ | cache, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
            )
            if done.returncode:
                why = f"ended with {done.returncode}: {done.stderr.strip()[-600:]}"
        except subprocess.TimeoutExpired:
            why = f"not done after its {limit_s:.0f} s"
        return Outcome(json.loads(file.read_text()) if file.exists() else None, why)


@contextlib.contextmanager
def cold_caches(count: int) -> Iterator[list[str]]:
    """Empty folders for compiled kernels."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(count)]


def check(dtype: str, backward: bool, case: list[int]) -> dict[str, Any]:
    """A row of `kernel_checks`."""
    from benchmarks import kernel_checks

    return kernel_checks.check(dtype, backward, tuple(case))


def cold(rank: int, backward: bool) -> dict[str, float]:
    """Seconds to the first result of this process, whose cache is empty, and then at two lengths it has not seen."""
    import torch

    from benchmarks.kernel_sizes import inputs
    from benchmarks.rivals import passes
    from mamba3 import ops

    seconds = []
    for t in (2048, 2049, 4096):
        values = inputs(1, t, rank, torch.bfloat16)
        names = list(values)

        def call(*v, names=names):
            return ops.scan(**dict(zip(names, v, strict=True)), impl="triton").y

        torch.cuda.synchronize()
        start = time.perf_counter()
        passes(call, list(values.values()), backward).run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return dict(zip(("first_s", "odd_length_s", "longer_s"), seconds, strict=True))


def warm(rank: int, b: int, t: int, backward: bool) -> None:
    """Compiles ours for a shape, with what the user's cache has already."""
    from benchmarks import kernel_races

    kernel_races.ours(b, t, rank, backward).run()


def decode(rank: int, state: str) -> None:
    """Compiles ours for the decode steps of a rank and a dtype of the state.

    A prompt is read first, as everywhere: Triton asks once in a process for its assembler's version, which is part of the keys
    it finds kernels by, and a scan is where another assembler may be taken."""
    from benchmarks import kernel_races
    from benchmarks.kernel_sizes import DECODE

    kernel_races.ours(1, 2048, rank, False).run()
    layer = kernel_races.layer_of(rank)
    for b in DECODE:
        for run in kernel_races.steps(layer, b, state)[0].values():
            run()


def tile(kernel: str, b: int, t: int) -> None:
    """Compiles a kernel of the official MIMO for a shape."""
    from benchmarks import rivals

    rivals.compile_official_mimo(kernel, b, t)


def tune(name: str, b: int, t: int, part: int, parts: int, passes: list[bool]) -> Iterator[dict[str, Any]]:
    """Compiles a part of a rival's candidates and calls each once; what was compiled stays in the user's cache. passes: the
    forward (False), and forward and backward (True); a result after each, with all before it."""
    import torch

    from benchmarks import rivals
    from mamba3.ops.triton.assembler import sound_assembler

    rival = next(r for r in rivals.RIVALS if r.name == name)
    with sound_assembler(torch.device("cuda")):
        built, start = rival.build(b, t), time.perf_counter()
        rivals.shorten_tuning(part, parts, measure=False)
        for i, backward in enumerate(passes):
            rivals.passes(*built, backward).run()
            torch.cuda.synchronize()
            yield {"seconds": time.perf_counter() - start, "done": passes[: i + 1]}


def _timed(work: Callable[..., None], **settings: Any) -> list[dict[str, float]]:
    start = time.perf_counter()
    work(**settings)
    return [{"seconds": time.perf_counter() - start}]


KINDS: dict[str, Callable[..., Iterable[Any]]] = {
    "check": lambda **s: [check(**s)],
    "cold": lambda **s: [cold(**s)],
    "warm": functools.partial(_timed, warm),
    "decode": functools.partial(_timed, decode),
    "tile": functools.partial(_timed, tile),
    "tune": tune,
}

if __name__ == "__main__":
    for result in KINDS[sys.argv[1]](**json.loads(sys.argv[2])):
        replace_file(Path(sys.argv[3]), json.dumps(result).encode())
