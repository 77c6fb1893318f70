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
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from claims import Workers, claim, devices, orphaned
from table5b_figure import TASKS, draw
from table5b_plans import PARITY_STEPS, finishing, plans

from mamba3.ops.state_file import replace_file
from mamba3.tasks import make_task, peers
from mamba3.tasks.fit import RESULTS, require_same
from mamba3.tasks.models import LAYERS, OTHER_LAYERS, model_config
from mamba3.tasks.peers import PEERS, peer, why_not
from mamba3.tasks.plan import Member, Plan
from mamba3.tasks.settings import PAPER_RATES, Settings
from mamba3.tasks.sweep import ONE_AT_A_TIME, Sweep

# Scaled accuracy in % at 256 tokens, as printed in arXiv 2603.15569, Table 5b.
PAPER = {
    "mamba3": (100.00, 98.51, 87.75), "mamba3-rope": (1.56, 20.70, 2.62), "mamba3-norotation": (2.27, 1.49, 0.72),
    "mamba2": (0.90, 47.81, 0.88), "gdn": (100.00, 99.25, 93.50),
}  # fmt: skip
FULL = Settings()
QUICK = Settings(stages=(5, 9), steps=3, batch=8, ranges=((12, 12), (5, 12), (24, 24)), sequences=32, long_sequences=32)
FAILED = "failed.txt"
STAGGER = 5.0  # seconds
AGAIN, AT_MOST_AGAIN = "TABLE5B_AGAIN", 3  # how often a process has been started anew, after a fault of a kernel
QUICK_SIZES = {"d_state": 8, "headdim": 16, "layers": 1}


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


def entrants(plan: Plan, quick: bool, device: torch.device, *, plain: bool = False, padded: bool = False):
    """The models of a plan."""
    from mamba3.tasks.entrants import Apart, Folded, Mapped

    task, sizes = make_task(plan.task), QUICK_SIZES if quick else {}
    seeds, kinds = [m.seed for m in plan.members], [m.kind for m in plan.members]
    if kinds[0] in PEERS:
        layers = sizes.get("layers") or LAYERS.get(plan.task, OTHER_LAYERS)
        sizes = {k: v for k, v in sizes.items() if k != "layers"}
        return Apart(lambda: peer(kinds[0], task.vocab_size, plan.d_model, layers, device=device, **sizes), seeds)
    sizes = {"headdim": plan.headdim} | sizes
    configs = [model_config(plan.task, task.vocab_size, kind, d_model=plan.d_model, **sizes) for kind in kinds]
    return (
        Mapped(configs[0], seeds)
        if kinds[0] == "transformer"
        else Folded(configs, seeds, kernels=device.type == "cuda" and not plain, packed=not padded)
    )


def work(options: argparse.Namespace, wanted: dict[str, Plan]) -> None:
    """One process: take plans that nobody is at until none is left or the time ends."""
    device = torch.device("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu")
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))

    def late() -> bool:
        over = options.until is not None and time.time() > options.until
        return over or bool(told) or orphaned(options.worker)

    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.readers, mp_context=context) if options.readers else None
    broken = threading.Event()

    def take(first: float) -> None:
        broken.wait(first)
        for name, plan in chain(wanted.items(), seed_plans(wanted, options.out, options.seeds)):
            if late() or broken.is_set():
                break
            with claim(options.out / "claims" / name) as mine:
                if mine and not (options.out / name / FAILED).is_file() and not finished(plan, options.out / name):
                    attempt(name, plan, options, device, pool, lambda: late() or broken.is_set(), broken)

    # A process's second plan comes after every process's first: the most wanted ones do not share a GPU.
    later = STAGGER if device.type == "cuda" else 0.0
    beside = [threading.Thread(target=take, args=(later * i,)) for i in range(1, options.side_by_side)]
    for thread in beside:
        thread.start()
    take(0.0)
    for thread in beside:
        thread.join()
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
    if broken.is_set() and not late() and (again := int(os.environ.get(AGAIN, "0"))) < AT_MOST_AGAIN:
        # A fault of a kernel ends all that a process can do on its GPU: a new one goes on from the checkpoints.
        os.environ[AGAIN] = str(again + 1)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def attempt(
    name: str, plan: Plan, options: argparse.Namespace, device: torch.device, pool: ProcessPoolExecutor | None,
    late: Callable[[], bool], broken: threading.Event,
) -> None:  # fmt: skip
    """Train one plan, or as much of it as the time allows; why it failed is written into its folder. broken is set where the
    GPU answers nothing any more; what fails in other threads after that is not their plans' fault."""

    def say(text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}")
        sys.stderr.flush()

    try:
        with ONE_AT_A_TIME:
            if plan.members[0].kind == "gdn":
                sound(device)
            built = entrants(plan, options.quick, device, plain=options.plain, padded=options.padded)
            sweep = Sweep(plan, built, options.out / name, device, pool=pool, save_every=options.save_every, say=say)
        sweep.run(late)
    except Exception as error:  # noqa: BLE001 (the others go on, and the table names it)
        say(f"{name} failed: {type(error).__name__}: {error}\n{traceback.format_exc()}\n")
        if broken.is_set():
            return
        if not answers(device):
            broken.set()
        (options.out / name).mkdir(parents=True, exist_ok=True)
        replace_file(options.out / name / FAILED, f"{type(error).__name__}: {error}".encode())
    if device.type == "cuda" and not broken.is_set():
        with ONE_AT_A_TIME:
            torch.cuda.empty_cache()


@lru_cache
def sound(device: torch.device) -> ExitStack:
    """From now on gated DeltaNet's kernels are compiled as they must be; to the process's end, for threads share how."""
    stack = ExitStack()
    stack.enter_context(peers.sound_kernels(device))
    return stack  # which ends where it is forgotten: kept by the cache


def answers(device: torch.device) -> bool:
    """Whether the device still does what it is told."""
    try:
        return int(torch.ones(1, device=device).sum()) == 1
    except RuntimeError:
        return False


def finished(plan: Plan, folder: Path) -> bool:
    """Whether a folder holds the plan's results. Raises ValueError where they are of other settings."""
    if not (folder / RESULTS).is_file():
        return False
    require_same(json.loads((folder / RESULTS).read_text())["identity"], plan.identity(), folder)
    return True


def lead(options: argparse.Namespace, wanted: dict[str, Plan]) -> None:
    """One working process a GPU, or this one alone on a CPU or for one plan."""
    for name in wanted:
        with claim(options.out / "claims" / name) as mine:
            if mine:  # what failed in an earlier call is tried again
                (options.out / name / FAILED).unlink(missing_ok=True)
    gpus = devices(options.device)[: options.gpus]
    count = (len(gpus) or options.gpus or 1) * options.each
    if count == 1:
        work(options, wanted)
        return
    share = [f"--until={options.until}"] if options.until else []
    failed = Workers([__file__, *sys.argv[1:], *share], count, gpus, options.out).wait()
    if failed:
        sys.stderr.write(f"Workers failed, for the reasons in {', '.join(map(str, failed))}.\n")


def chosen(options: argparse.Namespace) -> dict[str, Plan]:
    """The plans asked for, in their order."""
    settings, rates = (QUICK, (1e-3, 1e-2)) if options.quick else (FULL, PAPER_RATES)
    settings = replace(settings, **{k: v for k in ("stages", "steps") if (v := getattr(options, k)) is not None})
    every = plans(settings, rates, options.steps or min(PARITY_STEPS, settings.steps))
    every |= finishing(settings, options.steps or (settings.steps if options.quick else None))
    default = finishing(settings) if options.finish else plans(settings, rates, PARITY_STEPS)
    unknown = set(options.only or ()) - every.keys()
    if unknown:
        raise SystemExit(f"plans are {', '.join(every)}; there is no {', '.join(sorted(unknown))}.")
    wanted = {name: every[name] for name in options.only or default}
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
                why = (place / FAILED).read_text() if (place / FAILED).is_file() else None
                rows.append({**row, "failed": why} if why else row)
                continue
            runs = [run for run in results["runs"] if run["kind"] == kind]
            best = next(run for run in runs if run["best_of_kind"])
            first = next(iter(best["scaled"]))
            row |= {"best": best["scaled"], "rate": best["rate"], "runs": runs, "device": results["device"]}
            row["dropped"] = [run for run in results["dropped"] if run["kind"] == kind]
            same = [run["scaled"][first] for run in runs if run["rate"] == best["rate"]]
            if len(same) > 1:  # seeds of the best rate that were trained to the end beside it
                row |= {"seeds": same, "median": statistics.median(same)}
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
    parser.add_argument("--finish", action="store_true", help="what the grid left open: see table5b_plans.finishing")
    parser.add_argument("--seeds", type=int, default=1, help="of each finished plan's best rates, when no plan is left")
    parser.add_argument("--minutes", type=float, help="stop by itself after so many")
    parser.add_argument("--gpus", type=int, help="GPUs to take (default: all that there are)")
    parser.add_argument("--each", type=int, default=1, help="working processes a GPU")
    parser.add_argument("--side-by-side", type=int, default=1, help="plans that a working process trains at once")
    parser.add_argument(
        "--padded", action="store_true", help="sequences padded to one length, by the kernels for any length"
    )
    parser.add_argument("--readers", type=int, default=0, help="processes that make the sequences of each worker")
    parser.add_argument("--plain", action="store_true", help="PyTorch where kernels would do the mixing on a GPU")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models, to see that all of it runs")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.until is None and options.minutes is not None:
        options.until = time.time() + 60 * options.minutes
    wanted = chosen(options)
    if options.worker is not None:
        work(options, wanted)
        return
    lead(options, wanted)
    rows = table(wanted, options.out)
    replace_file(
        options.out / "table5b.json", (json.dumps({"quick": options.quick, "rows": rows}, indent=1) + "\n").encode()
    )
    draw(rows, options.out / "table5b.png", options.quick)
    done = sum("best" in row for row in rows)
    sys.stdout.write(f"{done} of {len(rows)} rows are finished: {options.out / 'table5b.json'}\n")


if __name__ == "__main__":
    main()
