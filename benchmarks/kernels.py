"""The Triton kernels on this GPU: `mamba3 bench kernels` in a checkout. Runs only behind green checks; JSON and a plot.

Contestants take turns in one process (`cuda.race`). `roofline` is the larger of two floors, bytes over the copy rate and
products over the matrix rate, both rates measured in the same run, divided by the time. `cold` is the first result on an
empty cache of compiled kernels, beside the other processes that compile. Every section's first shape comes before the
others, and the file is written anew after every row: a run cut short keeps what it has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
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
from benchmarks.rivals import RIVALS, Prepared

SECTIONS = ("forward", "backward", "decode", "profile")
# Where rivals are compiled ahead: what they tune does not depend on batch and length, but for the official MIMO.
TUNED_AT = (8, 2048)
PROFILED = (8, 2048)


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _jobs(caches: list[str], backward: bool, with_rivals: bool, quick: bool) -> dict[str, Job]:
    """Everything that compiles, what is waited for first; `backward`: that pass too; `quick`: one check of each kind."""
    jobs, passes = {}, (True, False) if backward else (False,)
    titles = {True: "forward + backward", False: "forward"}
    for i, (rank, wanted) in enumerate((r, w) for r in SHAPES for w in passes):
        jobs[f"cold R={rank} {titles[wanted]}"] = Job("cold", {"rank": rank, "backward": wanted}, caches[i])
    for dtype, cases in CASES.items():
        for name in ("backward", "forward") if backward else ("forward",):
            for case in cases[name][: 1 if quick else None]:
                settings = {"dtype": dtype, "backward": name == "backward", "case": case}
                jobs[f"check {name} {dtype} {case}"] = Job("check", settings)
    for rival in RIVALS if with_rivals else ():
        together = [[False, True]] if backward and rival.parts > 0 else [[wanted] for wanted in passes]
        for which in together:
            # What compiles anew for every shape is asked for all of them forward, and for one backward, which takes minutes.
            every = rival.parts < 0 and not quick and not which[-1]
            for b, t in (s for s in (SHAPES[rival.rank] if every else [TUNED_AT]) if s[1] <= rival.longest):
                for part in range(abs(rival.parts)):
                    settings = {
                        "name": rival.name,
                        "b": b,
                        "t": t,
                        "part": part,
                        "parts": abs(rival.parts),
                        "passes": which,
                    }
                    title = f"compile {rival.name} ({b}, {t}) {titles[which[-1]]} {part + 1}/{abs(rival.parts)}"
                    jobs[title] = Job("tune", settings)
    return jobs


def _prepare(limit_s: float, backward: bool, with_rivals: bool, quick: bool) -> tuple[dict[str, Any], Prepared]:
    """Checks, cold starts, and rivals compiled. ValueError where a check is red or could not be made."""
    with cold_caches(2 * len(SHAPES)) as caches:
        jobs = _jobs(caches, backward, with_rivals, quick)
        outcomes = run_all(jobs, limit_s, 3 * (os.cpu_count() or 1) // 2, say)
        _keep_compiled(caches)

    def of(kind: str) -> dict[str, Outcome]:
        return {name: outcomes[name] for name, job in jobs.items() if job.kind == kind}

    checks = [o.result for o in of("check").values() if o.result]
    red = [row for row in checks if not row["ok"]] + [f"{name}: {o.why}" for name, o in of("check").items() if o.why]
    if red:
        raise ValueError(f"{len(red)} checks are red, so nothing is timed; the first: {red[0]}")
    say(f"{len(checks)} checks green")
    cold = {name: o.result or {"failed": o.why} for name, o in of("cold").items()}
    for name, row in cold.items():
        say(f"{name}: {row}")
    done = {
        "checks": checks,
        "cold": cold,
        "compiled_ahead": {
            name: (o.result or {}) | ({"failed": o.why} if o.why else {}) for name, o in of("tune").items()
        },
    }
    return done, _prepared(jobs, outcomes)


def _keep_compiled(caches: list[str]) -> None:
    """What the cold processes compiled is put where this one looks for it."""
    from triton import knobs

    for folder in caches:
        shutil.copytree(folder, knobs.cache.dir, dirs_exist_ok=True)


def _prepared(jobs: dict[str, Job], outcomes: dict[str, Outcome]) -> Prepared:
    """What the processes that compiled rivals found. One is unready where none of its processes was done."""
    finalists: dict[str, set[str]] = {}
    failed: dict[tuple[str, int, int, bool], str] = {}
    ready: set[tuple[str, int, int, bool]] = set()
    for name, job in ((name, job) for name, job in jobs.items() if job.kind == "tune"):
        rival = next(r for r in RIVALS if r.name == job.settings["name"])
        shapes = [(job.settings["b"], job.settings["t"])] if rival.parts < 0 else SHAPES[rival.rank]
        outcome = outcomes[name]
        for kernel, configs in (outcome.result or {}).get("winners", {}).items():
            finalists.setdefault(kernel, set()).update(configs)
        for b, t in shapes:
            for wanted in job.settings["passes"]:
                if wanted in (outcome.result or {}).get("done", ()):
                    ready.add((rival.name, b, t, wanted))
                else:
                    failed[(rival.name, b, t, wanted)] = f"compiling ahead {outcome.why}"
    everything = (
        (r.name, b, t, wanted) for r in RIVALS if r.parts for b, t in SHAPES[r.rank] for wanted in (False, True)
    )
    never = "not asked for: it compiles anew for every shape"
    return Prepared(finalists, {key: failed.get(key, never) for key in everything if key not in ready})


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
    measured, prepared = _prepare(limit_s, "backward" in sections, with_rivals, quick)
    top = measured["ceilings"] = ceilings()
    say(f"ceilings: {top}")
    settings = Settings(
        shapes={r: shapes[:1] if quick else shapes for r, shapes in SHAPES.items()},
        batches=DECODE[:1] if quick else DECODE, rounds=3 if quick else ROUNDS,
        ready_s=ready_s if with_rivals else None, prepared=prepared, chunked=chunked, top=top,
    )  # fmt: skip
    every = set(sections) == set(SECTIONS)
    subject = "kernels" if every else f"kernels-{'-'.join(s for s in SECTIONS if s in sections)}"
    out = results.write(subject, where, quick, measured, None, folder)
    for name, rows in _races(sections, settings):
        for row in rows:
            measured.setdefault(name, []).append(row)
            results.write(subject, where, quick, measured, None, folder)
    results.write(subject, where, quick, measured, draw_kernels, folder)
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
