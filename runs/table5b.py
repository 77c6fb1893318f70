"""Table 5b of the paper, unattended: every task x model x width, learning rates and kinds of model side by side.

    python runs/table5b.py --out table5b                 # all plans, on every GPU there is
    python runs/table5b.py --out table5b --minutes 8     # stops by itself; the same command goes on
    python runs/table5b.py --out smoke --quick           # the same path in seconds on a CPU; its figures mean nothing

May be stopped or killed at any moment: the same command skips the plans that are finished and goes on in the middle of those
that are not. Writes OUT/PLAN/results.json, OUT/table5b.json and OUT/table5b.png. Method and choices:
docs/results/state-tracking.md.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from table5b_figure import TASKS, draw

from mamba3.ops.state_file import replace_file
from mamba3.tasks import make_task
from mamba3.tasks.models import LAYERS, OTHER_LAYERS, model_config
from mamba3.tasks.peers import PEERS, peer, why_not
from mamba3.tasks.plan import Member, Plan
from mamba3.tasks.settings import PAPER_RATES, Settings
from mamba3.tasks.sweep import Sweep

# Scaled accuracy in % at 256 tokens, as printed in arXiv 2603.15569, Table 5b.
PAPER = {
    "mamba3": (100.00, 98.51, 87.75), "mamba3-rope": (1.56, 20.70, 2.62), "mamba3-norotation": (2.27, 1.49, 0.72),
    "mamba2": (0.90, 47.81, 0.88), "gdn": (100.00, 99.25, 93.50),
}  # fmt: skip
FULL = Settings()
PARITY_STEPS = 2_500  # of each stage; the paper's 10,000 are --steps 10000
QUICK = Settings(stages=(5, 9), steps=3, batch=8, ranges=((12, 12), (5, 12), (24, 24)), sequences=32, long_sequences=32)
QUICK_SIZES = {"d_state": 8, "headdim": 16, "layers": 1}
ROTATION = ("mamba3", "mamba3-rope", "mamba3-norotation")
ABLATIONS = ("mamba3-euler", "mamba3-trapezoid", "mamba3-nobias", "mamba3-heavytail")
WINNERS = {4: (8, 5, 3, 3), 2: (8, 4)}  # models of a kind that enter each stage, by the number of stages
OTHERS = {4: (8, 4, 2, 2), 2: (8, 4)}


def plans(settings: Settings, rates: tuple[float, ...], parity_steps: int) -> dict[str, Plan]:
    """All plans by name, the most wanted first."""
    found: dict[str, Plan] = {}

    def add(name: str, task: str, d_model: int, kinds: tuple[str, ...], keep: dict[int, tuple[int, ...]]) -> None:
        members = tuple(Member(kind, rate, 0) for kind in kinds for rate in rates)
        stages = len(settings.stages)
        # Grazzi et al.'s repository: no weight decay on parity, 0.1 on arithmetic.
        own = replace(settings, weight_decay=0.0, steps=parity_steps) if task == "parity" else settings
        found[f"{task}.{name}.d{d_model}"] = Plan(
            task, d_model, members, own, keep.get(stages, (8,) * stages), (1,) + (2,) * (stages - 1)
        )

    hard = TASKS[1:]
    for task in hard:
        add("mamba3", task, 64, ("mamba3",), WINNERS)
    add("rotation", "parity", 64, ROTATION, WINNERS)
    for task in hard:
        add("without", task, 64, ROTATION[1:], OTHERS)
    add("rotation", "parity", 32, ROTATION, WINNERS)
    for task in hard:
        add("mamba3", task, 32, ("mamba3",), WINNERS)
    for d_model in (64, 32):
        add("mimo", "parity", d_model, ("mamba3-mimo",), WINNERS)
    for task in hard:
        add("mimo", task, 64, ("mamba3-mimo",), OTHERS)
    for kind in ("transformer", "gdn", "mamba2"):
        for task in TASKS:
            add(kind, task, 64, (kind,), OTHERS)
    for task in TASKS:
        add("allturn", task, 64, ("mamba3-allturn",), OTHERS)
    add("allturn", "parity", 32, ("mamba3-allturn",), OTHERS)
    add("ablations", "parity", 64, ABLATIONS, OTHERS)
    for task in hard:
        add("ablations", task, 64, ABLATIONS, OTHERS)
    for task in hard:
        add("without", task, 32, ROTATION[1:], OTHERS)
        add("mimo", task, 32, ("mamba3-mimo",), OTHERS)
    return found


def seed_plans(wanted: dict[str, Plan], out: Path, seeds: int) -> Iterator[tuple[str, Plan]]:
    """Of each finished plan its best rates with seeds 1, 2, ...; other weights, and other sequences than the sweep's."""
    for name, plan in wanted.items():
        place = out / name / "results.json"
        if seeds < 2 or not place.is_file():
            continue
        best = [run for run in json.loads(place.read_text())["runs"] if run["best_of_kind"]]
        members = tuple(Member(run["kind"], run["rate"], seed) for run in best for seed in range(1, seeds))
        keep = (seeds - 1,) * len(plan.settings.stages)
        yield f"{name}.seeds", replace(plan, members=members, keep=keep, data_seed=1)


def entrants(plan: Plan, quick: bool, device: torch.device, *, plain: bool = False):
    """The models of a plan."""
    from mamba3.tasks.entrants import Apart, Folded, Mapped

    task, sizes = make_task(plan.task), QUICK_SIZES if quick else {}
    seeds, kinds = [m.seed for m in plan.members], [m.kind for m in plan.members]
    if kinds[0] in PEERS:
        layers = sizes.get("layers") or LAYERS.get(plan.task, OTHER_LAYERS)
        sizes = {k: v for k, v in sizes.items() if k != "layers"}
        return Apart(lambda: peer(kinds[0], task.vocab_size, plan.d_model, layers, device=device, **sizes), seeds)
    configs = [model_config(plan.task, task.vocab_size, kind, d_model=plan.d_model, **sizes) for kind in kinds]
    return (
        Mapped(configs[0], seeds)
        if kinds[0] == "transformer"
        else Folded(configs, seeds, kernels=device.type == "cuda" and not plain)
    )


def work(options: argparse.Namespace, wanted: dict[str, Plan]) -> None:
    """One process: take plans that nobody has taken until none is left or the time ends."""
    device = torch.device("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu")

    def late() -> bool:
        return options.until is not None and time.time() > options.until

    def say(text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}")
        sys.stderr.flush()

    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.readers, mp_context=context) if options.readers else None
    for name, plan in chain(wanted.items(), seed_plans(wanted, options.out, options.seeds)):
        if late() or not claimed(options.out / "claims" / name):
            continue
        try:
            Sweep(
                plan, entrants(plan, options.quick, device, plain=options.plain), options.out / name, device,
                pool=pool, save_every=options.save_every, say=say,
            ).run(late)  # fmt: skip
        except Exception as error:  # noqa: BLE001 (the others go on, and the table names it)
            import traceback

            say(f"{name} failed: {type(error).__name__}: {error}\n{traceback.format_exc()}\n")
            (options.out / name).mkdir(parents=True, exist_ok=True)
            replace_file(options.out / name / "failed.txt", f"{type(error).__name__}: {error}".encode())
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)


def claimed(place: Path) -> bool:
    """Whether this process is the one that takes the plan."""
    try:
        place.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def lead(options: argparse.Namespace) -> None:
    """One working process a GPU, or this one alone on a CPU or for one plan."""
    shutil.rmtree(options.out / "claims", ignore_errors=True)
    count = torch.cuda.device_count() if options.device != "cpu" else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(i) for i in range(count)]
    if count * options.each <= 1:
        work(options, chosen(options))
        return
    share = [f"--until={options.until}"] if options.until else []
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", *share],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": devices[i % count]},
            stderr=(options.out / f"worker{i}.log").open("ab"),
        )
        for i in range(count * options.each)
    ]
    for child in children:
        child.wait()


def chosen(options: argparse.Namespace) -> dict[str, Plan]:
    """The plans asked for, in their order."""
    settings, rates = (QUICK, (1e-3, 1e-2)) if options.quick else (FULL, PAPER_RATES)
    settings = replace(settings, **{k: v for k in ("stages", "steps") if (v := getattr(options, k)) is not None})
    every = plans(settings, rates, options.steps or min(PARITY_STEPS, settings.steps))
    unknown = set(options.only or ()) - every.keys()
    if unknown:
        raise SystemExit(f"plans are {', '.join(every)}; there is no {', '.join(sorted(unknown))}.")
    wanted = {name: every[name] for name in options.only or every}
    return {
        name: plan
        for name, plan in wanted.items()
        if plan.members[0].kind not in PEERS or can_run(name, plan, options.device)
    }


def can_run(name: str, plan: Plan, device: str) -> bool:
    reason = why_not(plan.members[0].kind, "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if reason:
        sys.stderr.write(f"{name} is left out: {reason}.\n")
    return reason is None


def table(wanted: dict[str, Plan], out: Path) -> list[dict]:
    """One row a task, model and width: what is finished, what failed, and how far the rest is."""
    rows = []
    for name, plan in wanted.items():
        place = out / name
        results = json.loads((place / "results.json").read_text()) if (place / "results.json").is_file() else None
        for kind in dict.fromkeys(m.kind for m in plan.members):
            printed = PAPER.get(kind)
            row = {"task": plan.task, "model": kind, "d_model": plan.d_model, "plan": name}
            row["paper"] = printed[TASKS.index(plan.task)] if printed else None
            if results is None:
                why = (place / "failed.txt").read_text() if (place / "failed.txt").is_file() else None
                rows.append({**row, "failed": why} if why else row)
                continue
            runs = [run for run in results["runs"] if run["kind"] == kind]
            best = next(run for run in runs if run["best_of_kind"])
            first = next(iter(best["scaled"]))
            row |= {"best": best["scaled"], "rate": best["rate"], "runs": runs, "device": results["device"]}
            row["dropped"] = [run for run in results["dropped"] if run["kind"] == kind]
            again = out / f"{name}.seeds" / "results.json"
            if again.is_file():
                others = [run for run in json.loads(again.read_text())["runs"] if run["kind"] == kind]
                scores = [run["scaled"][first] for run in (best, *others)]
                row |= {"seeds": scores, "median": statistics.median(scores)}
            rows.append({**row, "seconds": results["training_seconds"], "torch": results["torch"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("table5b"))
    parser.add_argument("--only", nargs="+", help="names of plans, in this order")
    parser.add_argument("--stages", nargs="+", type=int, help="longest training sequence of each stage")
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage")
    parser.add_argument("--seeds", type=int, default=1, help="of each finished plan's best rates, when no plan is left")
    parser.add_argument("--minutes", type=float, help="stop by itself after so many")
    parser.add_argument("--each", type=int, default=1, help="working processes a GPU")
    parser.add_argument("--readers", type=int, default=0, help="processes that make the sequences of each worker")
    parser.add_argument("--plain", action="store_true", help="PyTorch where kernels would do the mixing on a GPU")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models, to see that all of it runs")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.until is None and options.minutes is not None:
        options.until = time.time() + 60 * options.minutes
    wanted = chosen(options)
    if options.worker:
        work(options, wanted)
        return
    lead(options)
    rows = table(wanted, options.out)
    replace_file(
        options.out / "table5b.json", (json.dumps({"quick": options.quick, "rows": rows}, indent=1) + "\n").encode()
    )
    draw(rows, options.out / "table5b.png", options.quick)
    done = sum("best" in row for row in rows)
    sys.stdout.write(f"{done} of {len(rows)} rows are finished: {options.out / 'table5b.json'}\n")


if __name__ == "__main__":
    main()
