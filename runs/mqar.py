"""Multi-query associative recall, unattended: Mamba-3 with and without a short convolution, attention, the hybrid.

    python runs/mqar.py --out mqar                   # T 256, 512, 1024, K = T / 4 pairs, 8,192 tokens; a GPU is wanted
    python runs/mqar.py --out smoke --quick          # the same path in seconds on a CPU; its figures mean nothing

Two layers, no MLP; the rates of a cell are trained side by side, the best is the result. May be stopped or killed at any
moment: the same command goes on. Writes OUT/mqar.json (rewritten after every cell). Source of the setting: HazyResearch/zoology
and the appendix D.1 of Mamba-2, whose curriculum over the number of pairs is left out: every sequence has K = T / 4.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from mamba3.lm import Mamba3Config
from mamba3.ops.state_file import replace_file
from mamba3.tasks import MQAR
from mamba3.tasks.fit import NonFiniteError, fit
from mamba3.tasks.settings import Settings

LENGTHS, WIDTHS = (256, 512, 1024), (64, 128)
# The pattern of the two layers, and the width of the short convolution over x, B and C.
MODELS = {
    "mamba3": (("mamba3", "mamba3"), 0),
    "mamba3-conv": (("mamba3", "mamba3"), 4),
    "hybrid": (("mamba3", "attention"), 0),
    "hybrid-conv": (("mamba3", "attention"), 4),
    "attention": (("attention", "attention"), 0),
}
FULL = Settings(
    rates=(10**-3.5, 10**-3, 10**-2.5, 10**-2), stages=(256,), steps=20_000, batch=256, shortest=4, weight_decay=0.1,
    ranges=((256, 256),), sequences=1024, long_sequences=1024, save_every=200,
)  # fmt: skip


def config(name: str, d_model: int, vocab_size: int, quick: bool) -> Mamba3Config:
    """Heads of 64 channels (attention: 32), N = 64 as in the state-tracking runs."""
    layers, d_conv = MODELS[name]
    n, p = (8, 16) if quick else (64, 64)
    return Mamba3Config(
        vocab_size=vocab_size, d_model=d_model, layers=layers, d_state=n, headdim=p, d_conv=d_conv,
        attn_heads=max(1, d_model // 32),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mqar"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--d-model", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="stop by itself after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models, to see that all of it runs")
    options = parser.parse_args()
    until = None if options.minutes is None else time.time() + 60 * options.minutes
    if options.quick:
        options.lengths, options.d_model = (16,), (16,)
    options.out.mkdir(parents=True, exist_ok=True)
    task, rows = MQAR(vocab_size=32 if options.quick else 8192), []
    for length in options.lengths:
        # 2^18 tokens a step, as in Mamba-2's appendix.
        batch = 4 if options.quick else max(1, 2**18 // length)
        chosen = replace(FULL, stages=(length,), ranges=((length, length),), batch=batch)
        chosen = replace(chosen, steps=3, sequences=8, rates=(1e-3, 1e-2)) if options.quick else chosen
        chosen = chosen if options.steps is None else replace(chosen, steps=options.steps)
        for d_model in options.d_model:
            for name in options.models:
                row = {"T": length, "K": length // 4, "d_model": d_model, "model": name}
                try:
                    results = fit(
                        task, config(name, d_model, task.vocab_size, options.quick), chosen,
                        options.out / f"T{length}.{name}.d{d_model}", device=options.device,
                        should_stop=lambda: until is not None and time.time() > until,
                    )  # fmt: skip
                except NonFiniteError as error:
                    rows.append({**row, "failed": str(error)})
                else:
                    if results is None:
                        sys.stdout.write(f"stopped in {row}; the same command goes on from there\n")
                        return
                    accuracy = max(run["scaled"][f"{length}-{length}"] for run in results["runs"])
                    rows.append({**row, "accuracy": accuracy, "runs": results["runs"], "device": results["device"]})
                table = {"quick": options.quick, "rows": rows}
                replace_file(options.out / "mqar.json", (json.dumps(table, indent=1) + "\n").encode())
    sys.stdout.write(f"{len(rows)} cells: {options.out / 'mqar.json'}\n")


if __name__ == "__main__":
    main()
