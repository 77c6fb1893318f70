"""The Triton kernels on this GPU: `mamba3 bench kernels` in a checkout. Runs only behind green checks; JSON and a plot.

Contestants take turns in one process (`cuda.race`). `roofline` is the larger of two floors, bytes over the copy rate and
products over the matrix rate, both rates measured in the same run, divided by the time. `cold` is the first result on an
empty cache of compiled kernels, of every rank and pass side by side, with nothing else running yet. Every section's first
shape comes before the others, and the file is written anew after every row: a run cut short keeps what it has.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, kernel_races, results
from benchmarks.cuda import ROUNDS, ceilings
from benchmarks.kernel_checks import CASES
from benchmarks.kernel_jobs import Job, Outcome, cold_caches, run_all
from benchmarks.kernel_races import Settings
from benchmarks.kernel_sizes import DECODE, SHAPES
from benchmarks.plots import draw_kernels
from benchmarks.rivals import CANDIDATES, MIMO_KERNELS, RIVALS, Unready, winners

SECTIONS = ("forward", "backward", "decode", "profile")
TITLES = {True: "forward + backward", False: "forward"}
# Where rivals are compiled ahead: what they tune does not depend on batch and length, but for the official MIMO.
TUNED_AT = (8, 2048)
WARMED = ((8, 2048), (1, 16384))  # ours: whole sequences, and segments
PROFILED = (8, 2048)
Keep = Callable[[dict[str, Any]], object]


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _cold_jobs(caches: list[str], backward: bool) -> dict[str, Job]:
    kinds = [(rank, wanted) for rank in SHAPES for wanted in ((True, False) if backward else (False,))]
    return {
        f"cold R={rank} {TITLES[wanted]}": Job("cold", {"rank": rank, "backward": wanted}, caches[i])
        for i, (rank, wanted) in enumerate(kinds)
    }


def _jobs(backward: bool, decode: bool, with_rivals: bool, quick: bool) -> dict[str, Job]:
    """Everything else that compiles, what takes longest first; `quick`: one check of each kind."""
    jobs: dict[str, Job] = {}
    kernels = MIMO_KERNELS if backward else MIMO_KERNELS[-1:]
    for rival in (r for r in RIVALS if with_rivals and r.parts < 0):
        for b, t in (s for s in SHAPES[rival.rank][: 1 if quick else None] if s[1] <= rival.longest):
            for kernel in kernels:
                jobs[f"compile {rival.name} ({b}, {t}) {kernel}"] = Job("tile", {"kernel": kernel, "b": b, "t": t})
    for dtype, cases in CASES.items():
        for name in ("backward", "forward") if backward else ("forward",):
            for case in cases[name][: 1 if quick else None]:
                settings = {"dtype": dtype, "backward": name == "backward", "case": case}
                jobs[f"check {name} {dtype} {case}"] = Job("check", settings)
    passes = [False, True] if backward else [False]
    for rival in (r for r in RIVALS if with_rivals and r.parts > 0):
        for part in range(rival.parts):
            settings = {"name": rival.name, "b": TUNED_AT[0], "t": TUNED_AT[1], "part": part, "parts": rival.parts}
            jobs[f"compile {rival.name} {part + 1}/{rival.parts}"] = Job("tune", settings | {"passes": passes})
    for rank in SHAPES:
        for b, t in WARMED[: 1 if quick else None]:
            settings = {"rank": rank, "b": b, "t": t, "backward": backward}
            jobs[f"compile ours R={rank} ({b}, {t})"] = Job("warm", settings)
        for state in kernel_races.STATES if decode else ():
            jobs[f"compile decode R={rank} {state}"] = Job("decode", {"rank": rank, "state": state})
    return jobs


def _prepare(
    limit_s: float, sections: Sequence[str], with_rivals: bool, quick: bool, keep: Keep
) -> tuple[dict[str, Any], Unready]:
    """Cold starts, then checks, and everything compiled. ValueError where a check is red or could not be made."""
    backward, start = "backward" in sections, time.monotonic()
    with cold_caches(2 * len(SHAPES)) as caches:
        jobs = _cold_jobs(caches, backward)
        cold = run_all(jobs, limit_s, len(jobs), say)
        _keep_compiled(caches)
    done: dict[str, Any] = {"cold": {name: o.result or {"failed": o.why} for name, o in cold.items()}}
    for name, row in done["cold"].items():
        say(f"{name}: {row}")
    keep(done)
    jobs = _jobs(backward, "decode" in sections, with_rivals, quick)
    outcomes = run_all(jobs, limit_s - (time.monotonic() - start), 3 * (os.cpu_count() or 1) // 2, say)
    checked = {name: outcomes[name] for name, job in jobs.items() if job.kind == "check"}
    done["checks"] = checks = [o.result for o in checked.values() if o.result]
    red = [row for row in checks if not row["ok"]] + [f"{name}: {o.why}" for name, o in checked.items() if o.why]
    if red:
        raise ValueError(f"{len(red)} checks are red, so nothing is timed; the first: {red[0]}")
    say(f"{len(checks)} checks green, {time.monotonic() - start:.0f} s")
    done["compiled_ahead"] = {
        name: (outcomes[name].result or {}) | ({"failed": why} if (why := outcomes[name].why) else {})
        for name in jobs
        if name not in checked
    }
    keep(done)
    return done, _unready(jobs, outcomes)


def _keep_compiled(caches: list[str]) -> None:
    """What the cold processes compiled is put where this one looks for it: Triton's lists of a kernel's files have their full
    paths, and a file that is not there is compiled anew."""
    from triton import knobs

    for folder in caches:
        for listed in Path(folder).glob("*/__grp__*.json"):
            listed.write_text(listed.read_text().replace(str(folder), knobs.cache.dir))
        shutil.copytree(folder, knobs.cache.dir, dirs_exist_ok=True)


def _unready(jobs: dict[str, Job], outcomes: dict[str, Outcome]) -> Unready:
    """Rivals that were not compiled ahead. One that tunes itself is ready where any of its processes was done: what others did
    not compile is then compiled when it is tuned. One that compiles anew for a shape needs all the kernels of a pass."""
    unready: dict[tuple[str, int, int, bool], str] = {}
    for rival in (r for r in RIVALS if r.parts):
        for b, t in SHAPES[rival.rank]:
            for wanted in (False, True):
                late = []
                for name, job in jobs.items():
                    own = job.settings
                    if job.kind == "tile" and rival.parts < 0 and (own["b"], own["t"]) == (b, t):
                        if wanted or own["kernel"] == MIMO_KERNELS[-1]:
                            late.append(outcomes[name].why)
                    elif job.kind == "tune" and own["name"] == rival.name:
                        done = wanted in (outcomes[name].result or {}).get("done", ())
                        late.append(None if done else outcomes[name].why)
                if not late:
                    unready[rival.name, b, t, wanted] = "not asked for: it compiles anew for every shape"
                elif all(late) or (rival.parts < 0 and any(late)):
                    unready[rival.name, b, t, wanted] = f"compiling ahead {next(why for why in late if why)}"
    return unready


def run(
    folder: Path,
    *,
    sections: Sequence[str] = SECTIONS,
    quick: bool = False,
    chunked: bool = True,
    with_rivals: bool = True,
    limit_s: float = 150.0,
    ready_s: float = 60.0,
) -> Path:
    """All measurements, written to <date>-<device>-kernels.json and .png in `folder`; the name says which where not all are.

    Args:
        sections: which of SECTIONS.
        quick: one shape, few rounds, a check of each kind: does everything run? Not to be quoted.
        chunked: time the PyTorch path too, at the first shape.
        with_rivals: time other projects' kernels, where they can be imported.
        limit_s: seconds that checks and compilation may take, all together.
        ready_s: seconds that a rival, compiled ahead, may take to be ready at a shape.

    Raises ValueError where there is no CUDA device or a check is red; then nothing is timed.
    """
    if not torch.cuda.is_available():
        raise ValueError("the kernels' benchmark needs a CUDA device, and torch finds none here; run it on a GPU.")
    torch.manual_seed(0)
    where = environment.describe("cuda")
    say(f"{where['device']}, commit {where['commit']}")
    every = set(sections) == set(SECTIONS)
    subject = "kernels" if every else f"kernels-{'-'.join(s for s in SECTIONS if s in sections)}"

    def keep(measured: dict[str, Any]) -> None:
        results.write(subject, where, quick, measured, None, folder)

    measured, unready = _prepare(limit_s, sections, with_rivals, quick, keep)
    top = measured["ceilings"] = ceilings()
    say(f"ceilings: {top}")
    settings = Settings(
        shapes={r: shapes[:1] if quick else shapes for r, shapes in SHAPES.items()},
        batches=DECODE[:1] if quick else DECODE, rounds=3 if quick else ROUNDS,
        ready_s=ready_s if with_rivals else None, unready=unready, chunked=chunked, top=top,
    )  # fmt: skip
    for name, rows in _races(sections, settings):
        for row in rows:
            measured.setdefault(name, []).append(row)
            if with_rivals:
                measured["tuned"] = {"candidates": CANDIDATES, "best": winners()}
            keep(measured)
    out = results.write(subject, where, quick, measured, draw_kernels, folder)
    if "profile" in sections:
        measured["profile"] = {
            f"R={r} {name}": kernel_races.profile(*PROFILED, r, name == "backward")
            for r in SHAPES
            for name in ("forward", "backward")
            if name in sections
        }
        results.write(subject, where, quick, measured, draw_kernels, folder)
    say(f"written to {out.name} and {out.with_suffix('.png').name}")
    return out


def _races(sections: Sequence[str], settings: Settings) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """Rows by section, what matters most first."""
    for some in (slice(0, 1), slice(1, None)):
        for name in ("forward", "backward"):
            if name in sections:
                yield name, kernel_races.scans(name == "backward", settings, some, say)
        if "decode" in sections and some.stop is not None:
            yield "decode", kernel_races.decode(settings, say)
