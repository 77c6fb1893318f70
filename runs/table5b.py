"""Table 5b of the paper, unattended: every task x model x width, all learning rates at once, then more seeds of the best.

    python runs/table5b.py --out table5b            # the whole table; a GPU is wanted
    python runs/table5b.py --out smoke --quick      # the same path in seconds on a CPU; its figures mean nothing

May be stopped or killed at any moment: the same command skips what is finished and goes on in the middle of what is not.
Writes OUT/table5b.json (rewritten after every cell) and OUT/table5b.png. Method and choices: docs/results/state-tracking.md.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mamba3.ops.state_file import replace_file
from mamba3.tasks import make_task
from mamba3.tasks.fit import NonFiniteError, fit
from mamba3.tasks.models import KINDS, model_config
from mamba3.tasks.settings import PAPER_RATES, Settings

TASKS = ("parity", "arithmetic", "arithmetic-brackets")
# Scaled accuracy in % at 256 tokens, as printed in arXiv 2603.15569, Table 5b.
PAPER = {
    "mamba3": (100.00, 98.51, 87.75),
    "mamba3-rope": (1.56, 20.70, 2.62),
    "mamba3-norotation": (2.27, 1.49, 0.72),
}
FULL = Settings(rates=PAPER_RATES)
QUICK = Settings(
    rates=(1e-3, 1e-2), stages=(5, 9), steps=3, batch=8, ranges=((12, 12), (5, 12), (24, 24)), sequences=32,
    long_sequences=32, save_every=2,
)  # fmt: skip
QUICK_SIZES = {"d_state": 8, "headdim": 16, "layers": 1}


@dataclass(frozen=True)
class Cell:
    """One architecture on one task."""

    task: str
    kind: str
    d_model: int

    @property
    def name(self) -> str:
        return f"{self.task}.{self.kind}.d{self.d_model}"


def run_cell(cell: Cell, options: argparse.Namespace, settings: Settings, device: torch.device) -> dict:
    """The sweep of rates with the first seed, then the best rate with the others; {"failed": why} where all diverged."""
    task = make_task(cell.task)
    sizes = QUICK_SIZES if options.quick else {}
    config = model_config(cell.task, task.vocab_size, cell.kind, d_model=cell.d_model, **sizes)
    folder = options.out / "cells" / cell.name

    def train(name: str, chosen: Settings) -> dict:
        results = fit(task, config, chosen, folder / name, device=device, listen=Progress(f"{cell.name} {name}"))
        assert results is not None  # nothing asks it to stop
        return results

    failed = folder / "failed.txt"
    if failed.is_file():
        return {"failed": failed.read_text()}
    try:
        sweep = train("sweep", settings)
        best = sweep["runs"][sweep["best"]]
        others = tuple(range(1, options.seeds))
        again = train("seeds", replace(settings, rates=(best["rate"],), seeds=others)) if others else None
    except NonFiniteError as error:
        replace_file(failed, str(error).encode())
        return {"failed": str(error)}
    runs = [best] + (again["runs"] if again else [])
    names = list(best["scaled"])
    return {
        "best": best["scaled"],
        "best_rate": best["rate"],
        "seeds": {name: [run["scaled"][name] for run in runs] for name in names},
        "median": {name: statistics.median(run["scaled"][name] for run in runs) for name in names},
        "sweep": sweep["runs"],
        "seconds": sweep["training_seconds"] + (again["training_seconds"] if again else 0),
        "device": sweep["device"], "torch": sweep["torch"], "identity": sweep["identity"],
    }  # fmt: skip


class Progress:
    """One line a cell, rewritten in a terminal, a line every tenth of the run elsewhere."""

    def __init__(self, name: str):
        self.name, self.tenth = name, 0

    def __call__(self, step: int, steps: int, losses: list[float]) -> None:
        terminal, tenth = sys.stderr.isatty(), 10 * step // steps
        least = min((loss for loss in losses if math.isfinite(loss)), default=math.nan)
        if terminal or tenth > self.tenth:
            end = "\r" if terminal and step < steps else "\n"
            sys.stderr.write(f"{self.name}: step {step:,} of {steps:,}, least loss {least:.4f}{end}")
        self.tenth = tenth


def write(cells: dict[Cell, dict], out: Path, quick: bool) -> None:
    """table5b.json, whole or as it was."""
    rows = []
    for cell, result in cells.items():
        printed = PAPER.get(cell.kind)
        paper = printed[TASKS.index(cell.task)] if printed else None
        rows.append({"task": cell.task, "model": cell.kind, "d_model": cell.d_model, "paper": paper, **result})
    replace_file(out / "table5b.json", (json.dumps({"quick": quick, "cells": rows}, indent=1) + "\n").encode())


def draw(cells: dict[Cell, dict], out: Path, quick: bool) -> None:
    """One panel a task: scaled accuracy over length, best of the sweep; circles are the paper's figures at 256 tokens."""
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(cell.task == task for cell in cells)]
    figure = Figure(figsize=(4 * len(tasks) + 2, 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        lengths = {256}
        for cell, result in cells.items():
            if cell.task != task or "failed" in result:
                continue
            exact = {int(k.split("-")[1]): v for k, v in result["best"].items() if len(set(k.split("-"))) == 1}
            style, colour = "-" if cell.d_model >= 64 else "--", f"C{list(KINDS).index(cell.kind)}"
            axes.plot(
                list(exact), list(exact.values()), style, marker=".", color=colour, label=f"{cell.kind} {cell.d_model}"
            )
            lengths |= exact.keys()
            if cell.kind in PAPER:
                axes.plot([256], [PAPER[cell.kind][TASKS.index(task)]], "o", mfc="none", color=colour, ms=9)
        axes.set(title=task, xlabel="tokens", ylabel="scaled accuracy, %", xscale="log")
        axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    if quick:
        figure.suptitle("smoke run: these figures mean nothing")
    figure.savefig(out / "table5b.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("table5b"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--d-model", nargs="+", type=int, default=(32, 64))
    parser.add_argument("--seeds", type=int, default=3, help="of each cell's best rate")
    parser.add_argument("--stages", nargs="+", type=int, help="longest training sequence of each stage")
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models, to see that all of it runs")
    options = parser.parse_args()
    settings = QUICK if options.quick else FULL
    settings = replace(settings, **{k: v for k in ("stages", "steps") if (v := getattr(options, k)) is not None})
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options.device == "auto" else options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    cells: dict[Cell, dict] = {}
    for d_model in options.d_model:
        for task in options.tasks:
            for kind in options.models:
                cell = Cell(task, kind, d_model)
                cells[cell] = run_cell(cell, options, settings, device)
                write(cells, options.out, options.quick)
    draw(cells, options.out, options.quick)
    sys.stdout.write(f"{len(cells)} cells: {options.out / 'table5b.json'}, {options.out / 'table5b.png'}\n")


if __name__ == "__main__":
    main()
