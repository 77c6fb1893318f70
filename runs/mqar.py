"""Multi-query associative recall, unattended: Mamba-3 with and without a short convolution, hybrids, attention, Mamba-2.

    python runs/mqar.py --out mqar                   # T 256, 512, 1024 on one GPU
    python runs/mqar.py --out mqar --minutes 4       # stops by itself; the same command goes on
    python runs/mqar.py --out smoke --quick          # the same path in seconds on a CPU; its figures mean nothing

Two layers, no MLP, 8,192 tokens, fillers drawn at random (HazyResearch/zoology; appendix D.1 of Mamba-2). A step's sequences
have K = T / 4, T / 8, T / 16 and T / 32 pairs, a quarter each; T / 4 is what is evaluated. The rates of a cell train side by
side, the best is the result. Writes OUT/CELL/results.json and OUT/mqar.json.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from mamba3.ops.state_file import replace_file
from mamba3.tasks import MQAR
from mamba3.tasks.entrants import Apart
from mamba3.tasks.layered import RECALL, recall_model
from mamba3.tasks.plan import Member, Plan
from mamba3.tasks.settings import Settings
from mamba3.tasks.sweep import Sweep

LENGTHS, WIDTHS = (256, 512, 1024), (64,)
RATES = (10**-3, 10**-2.5, 10**-2)
TOKENS = 2**16  # of a step
GROUPS = 4


def plan(kind: str, length: int, d_model: int, options: argparse.Namespace) -> Plan:
    """One cell of the table."""
    quick = options.quick
    settings = Settings(
        stages=(length,), steps=3 if quick else options.steps, batch=8 if quick else TOKENS // length, shortest=4,
        weight_decay=0.1, ranges=((length, length),), sequences=4 if quick else 2048, long_sequences=4 if quick else 2048,
    )  # fmt: skip
    members = tuple(Member(kind, rate, 0) for rate in options.rates)
    return Plan(MQAR.name, d_model, members, settings, (len(members),), (1 if quick else GROUPS,))


def cells(options: argparse.Namespace) -> dict[str, Plan]:
    """All that is asked for, by name."""
    found = {}
    for length in options.lengths:
        for d_model in options.d_model:
            for kind in options.models:
                found[f"T{length}.{kind}.d{d_model}"] = plan(kind, length, d_model, options)
    return found


def row(name: str, cell: Plan, out: Path) -> dict:
    """What is known of a cell."""
    length = cell.settings.stages[0]
    known = {"cell": name, "T": length, "K": length // 4, "d_model": cell.d_model, "model": cell.members[0].kind}
    if not (out / name / "results.json").is_file():
        return known
    results = json.loads((out / name / "results.json").read_text())
    best = max(results["runs"], key=lambda run: (not run["diverged"], run["scaled"][f"{length}-{length}"]))
    return known | {
        "accuracy": best["scaled"][f"{length}-{length}"], "rate": best["rate"], "runs": results["runs"],
        "validations": results["validations"], "seconds": results["training_seconds"], "device": results["device"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mqar"))
    parser.add_argument("--models", nargs="+", choices=list(RECALL), default=list(RECALL))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--d-model", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, help="stop by itself after so many")
    parser.add_argument("--readers", type=int, default=0, help="processes that make the sequences")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models, to see that all of it runs")
    options = parser.parse_args()
    until = None if options.minutes is None else time.time() + 60 * options.minutes
    if options.quick:
        options.lengths, options.d_model, options.rates = (16,), (16,), (1e-3, 1e-2)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = {"d_state": 8, "headdim": 16} if options.quick else {}
    vocab, wanted = MQAR().vocab_size, cells(options)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.readers, mp_context=context) if options.readers else None
    for name, cell in wanted.items():
        if until is not None and time.time() > until:
            break
        kind, d_model = cell.members[0].kind, cell.d_model
        entrants = Apart(
            lambda kind=kind, d_model=d_model: recall_model(kind, vocab, d_model, **sizes), [0] * len(cell.members)
        )
        Sweep(cell, entrants, options.out / name, torch.device(options.device), pool=pool).run(
            lambda: until is not None and time.time() > until
        )
        if options.device != "cpu":
            torch.cuda.empty_cache()
    rows = [row(name, cell, options.out) for name, cell in wanted.items()]
    table = {"quick": options.quick, "rows": rows}
    replace_file(options.out / "mqar.json", (json.dumps(table, indent=1) + "\n").encode())
    done = sum("accuracy" in row for row in rows)
    sys.stdout.write(f"{done} of {len(rows)} cells are finished: {options.out / 'mqar.json'}\n")
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
