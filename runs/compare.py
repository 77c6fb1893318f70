"""Mamba-3 against the Transformer, Mamba-2 and gated DeltaNet at equal parameters and tokens: sweep, seeds, one table.

    python runs/books.py build --books BOOKS --out tokens
    python runs/compare.py --tokens tokens --out compare             # the whole comparison; a GPU is wanted
    python runs/compare.py --tokens tokens --out compare --plan      # what is done and what is left
    python runs/compare.py --out smoke --quick                       # the same path in a minute on a CPU; means nothing

Each kind is trained for a short sweep of learning rates, the same for all, then at its best rate for the whole budget with
each seed. Cells come in the order in which they are worth most: all sweeps, then seed 0 of all kinds, then seed 1, ...
May be stopped (--seconds, Ctrl-C) or killed at any moment: the same command goes on, in the middle of a cell where its folder
is still there, else from the cell's beginning. OUT/compare.json is the only file that must be kept: it holds every finished
cell and is rewritten after each; on another machine give it back with --known.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from books import read
from compare_cell import Cell, Line, curve, speed, spread_of
from compare_figure import draw
from contestants import ABLATIONS, KINDS, MAIN, STATES, Contestant, Size, kernel_of, why_not
from windows import Windows, spread_starts

from mamba3.ops.state_file import replace_file
from mamba3.train import NonFiniteError, TrainConfig, Trainer, checkpoint
from mamba3.train.data import Data
from mamba3.train.evaluate import evaluate
from mamba3.train.rows import Rows
from mamba3.train.store import Tokens
from mamba3.train.tokenizer import load_tokenizer, token_bytes

GROUPS = {"main": MAIN, "states": STATES, "ablations": ABLATIONS}
FULL, QUICK = Size(vocab_size=8192), Size(vocab_size=64, d_model=32, layers=2, inner=64, headdim=16, d_state=8)
TRAINING = TrainConfig(
    layout="rows", seq_len=2048, batch_tokens=65_536, dtype="bfloat16", compile=True, min_lr_fraction=0.1,
    weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0, eval_every=0, eval_tokens=0, save_every=200, keep=1,
)  # fmt: skip
QUICK_TRAINING = dataclasses.replace(
    TRAINING, seq_len=32, batch_tokens=128, dtype="float32", compile=False, save_every=2
)
WARMUP = 0.1  # share of the steps


class Stopped(Exception):
    """The time that was given is over, or Ctrl-C: what was begun is saved."""


def parent_of(kind: str) -> str:
    """The main kind whose sweep tells a kind's rate."""
    if kind in MAIN:
        return kind
    return next((main for main in MAIN if kind.startswith(f"{main}-n") and kind in STATES), "mamba3-siso")


class Race:
    """The comparison's state: finished cells, data, the clock."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.began, self.interrupted = options, time.monotonic(), False
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(automatic if options.device == "auto" else options.device)
        self.training, self.size = (QUICK_TRAINING, QUICK) if options.quick else (TRAINING, FULL)
        if not options.quick:
            compiled = not options.eager
            self.training = dataclasses.replace(
                self.training, batch_tokens=options.batch_tokens, micro_tokens=options.micro_tokens, compile=compiled
            )
        self.file = options.out / "compare.json"
        self.cells: dict[str, dict[str, Any]] = {}
        for known in (*options.known, self.file):
            if known.is_file():
                self.cells |= json.loads(known.read_text())["cells"]
        self.data: dict[str, Tokens] = {}
        self.broken: list[str] = []  # kinds that raised in this call
        self.compiled: str | None = None  # the kind that torch.compile saw last
        self.sizes: np.ndarray | None = None

    def open(self) -> None:
        """The three parts, and the bytes that tokens stand for."""
        if self.options.quick:
            numbers = np.random.default_rng(0).integers(0, 64, 12_000).astype(np.uint16)
            self.data = dict.fromkeys(("train", "val", "test"), Tokens([numbers], np.array([0, 7000, 12_000])))
            return
        self.data = {part: read(self.options.tokens, part) for part in ("train", "val", "test")}
        tokenizer = load_tokenizer(self.options.tokens)
        self.size = dataclasses.replace(self.size, vocab_size=tokenizer.get_vocab_size(with_added_tokens=True))
        self.sizes = token_bytes(tokenizer)

    def over(self) -> bool:
        return self.interrupted or time.monotonic() - self.began > self.options.seconds

    def plan(self) -> list[Cell]:
        """Every cell in order of worth, as far as the sweeps that are done tell their rates."""
        options = self.options
        kinds = [k for k in options.kinds if why_not(k, self.device) is None and k not in self.broken]
        cells = [self.cell(kind, rate, 0, final=False) for kind in kinds for rate in self.rates_of(kind)]
        for seed in range(options.seeds):
            for kind in kinds:
                best = self.best_rate(kind)
                if best is None and parent_of(kind) not in options.kinds:
                    raise SystemExit(self.missing_sweep(kind))
                if best is not None:
                    cells.append(self.cell(kind, best, seed, final=True))
        return cells

    def cell(self, kind: str, rate: float, seed: int, *, final: bool) -> Cell:
        """A cell of the lengths and the batch that were asked for."""
        tokens = self.options.train_tokens if final else self.options.sweep_tokens
        return Cell(kind, rate, seed, tokens, final=final, batch_tokens=self.training.batch_tokens)

    def rates_of(self, kind: str) -> tuple[float, ...]:
        """The sweep's rates; a variant of a main kind takes the rate that the main kind was tuned to."""
        return tuple(self.options.rates) if kind in MAIN else ()

    def best_rate(self, kind: str) -> float | None:
        """The rate of the lowest validation loss, once the whole sweep is done."""
        if kind not in MAIN:
            return self.best_rate(parent_of(kind))
        swept = [self.cell(kind, rate, 0, final=False) for rate in self.rates_of(kind)]
        done = [(self.cells[cell.name], cell.rate) for cell in swept if cell.name in self.cells]
        fit = [(result["val_loss"], rate) for result, rate in done if "failed" not in result]
        return min(fit)[1] if fit and len(done) == len(swept) else None

    def missing_sweep(self, kind: str) -> str:
        """Why a variant has no rate, where its main kind is not swept by this call."""
        rates, parent = " ".join(f"{rate:g}" for rate in self.options.rates), parent_of(kind)
        return (
            f"{kind} takes the rate that {parent} was tuned to, but {self.file} holds no finished sweep of {parent} over "
            f"{rates} with {self.options.sweep_tokens:,} tokens; train --kinds {parent} first, or give its cells by --known."
        )

    def run(self) -> None:
        """All cells, then the table and the figure. Raises Stopped when the time is over."""
        while todo := [cell for cell in self.plan() if cell.name not in self.cells]:
            if self.over():
                raise Stopped
            cell = todo[0]
            try:
                self.cells[cell.name] = self.train(cell)
                self.write()
            except Stopped:
                raise
            except Exception:  # noqa: BLE001  # another library's failure must not cost the other kinds their hours
                sys.stderr.write(
                    f"{cell.name} failed, and {cell.kind} is left out of this call:\n{traceback.format_exc()}"
                )
                self.broken.append(cell.kind)

    def train(self, cell: Cell) -> dict[str, Any]:
        """Train and measure one cell; {"failed": why} where it diverged."""
        steps = max(2, cell.tokens // self.training.batch_tokens)
        config = dataclasses.replace(
            self.training, steps=steps, lr=cell.rate, seed=cell.seed, warmup_steps=min(steps - 1, round(WARMUP * steps))
        )
        folder = self.options.out / "cells" / cell.name
        newest = max(checkpoint.list_checkpoints(folder), default=None)
        if newest is not None:
            checkpoint.verify(newest)
        if self.compiled not in (None, cell.kind):
            # Other sizes of what was compiled before would be compiled for any size, which is slower.
            torch.compiler.reset()
        self.compiled = cell.kind
        torch.manual_seed(cell.seed)
        model = Contestant(cell.kind, self.size)
        rows = Rows(self.data["val"], seq_len=config.seq_len, batch_tokens=config.batch_tokens, seed=0)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer = Trainer(
                model, config, folder, data=Data(self.data["train"], None, config), device=self.device,
                reporter=Line(cell.name), identity={"cell": cell.name}, resume_from=newest,
            )  # fmt: skip
            if trainer.run(self.over).stopped:
                raise Stopped
        except NonFiniteError as error:
            return {**dataclasses.asdict(cell), "failed": str(error)}
        objective, sample = trainer.objective, rows.sample(self.options.eval_tokens)
        val = evaluate(objective, sample, device=self.device, sizes=self.sizes)
        result = {
            **dataclasses.asdict(cell), "steps": steps, "val_loss": val.loss, "val_bits_per_byte": val.bits_per_byte,
            "parameters": model.num_parameters(), "inner": model.inner, **speed(folder), "curve": curve(folder),
            "memory_bytes": {str(n): model.memory_bytes(n) for n in self.options.contexts},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu", "torch": torch.__version__,
            "scan": kernel_of(cell.kind, self.device, getattr(torch, config.dtype)),
        }  # fmt: skip
        if self.options.shared:
            result["tokens_per_second"] = None
        if self.device.type == "cuda":
            result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if cell.final:
            result["test_perplexity"] = self.perplexities(objective, config)
        return result

    def perplexities(self, objective: torch.nn.Module, config: TrainConfig) -> dict[str, float]:
        """Of the same held-out tokens, read in windows of each length; a longer one gives each token more to go on."""
        longest, found = max(self.options.contexts), {}
        starts = spread_starts(self.data["test"], longest, self.options.eval_tokens)
        for length in self.options.contexts:
            windows = Windows(self.data["test"], starts, longest, length)
            batches = windows.batches(max(1, config.batch_tokens // length))
            found[str(length)] = evaluate(objective, batches, device=self.device, sizes=self.sizes).perplexity
        return found

    def write(self) -> None:
        """compare.json, whole or as it was."""
        lines = [f" {json.dumps(name)}: {json.dumps(cell)}" for name, cell in self.cells.items()]
        table = json.dumps(self.table(), indent=1)
        text = (
            f'{{"quick": {json.dumps(self.options.quick)}, "table": {table}, "cells": {{\n'
            + ",\n".join(lines)
            + "\n}}\n"
        )
        replace_file(self.file, text.encode())

    def table(self) -> list[dict[str, Any]]:
        """A row for each kind: mean and standard deviation over the seeds that are done at its best rate.

        edge: that rate is the grid's lowest or highest, and the best one may lie beyond.
        """
        rows, edges = [], (min(self.options.rates), max(self.options.rates))
        for kind in self.options.kinds:
            best = self.best_rate(kind)
            done = [c for c in self.cells.values() if c["kind"] == kind and c["final"] and "failed" not in c]
            wanted = {"tokens": self.options.train_tokens, "rate": best, "batch_tokens": self.training.batch_tokens}
            done = [c for c in done if wanted.items() <= c.items()]
            if not done:
                continue
            row: dict[str, Any] = {"kind": kind, "seeds": len(done), "rate": best, "edge": best in edges}
            lengths = done[0]["test_perplexity"]
            row["test_perplexity"] = {n: spread_of([c["test_perplexity"][n] for c in done]) for n in lengths}
            row["val_loss"] = spread_of([c["val_loss"] for c in done])
            row |= {key: done[0][key] for key in ("parameters", "memory_bytes")}
            speeds = [c["tokens_per_second"] for c in done if c["tokens_per_second"] is not None]
            row["tokens_per_second"] = statistics.median(speeds) if speeds else None
            row |= {key: sorted({str(c.get(key, "not recorded")) for c in done}) for key in ("scan", "device")}
            rows.append(row)
        return rows


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=Path("tokens"), help="folder of runs/books.py")
    parser.add_argument("--out", type=Path, default=Path("compare"))
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="compare.json of earlier calls elsewhere")
    parser.add_argument("--group", choices=GROUPS, default="main", help="which kinds: the six, state sizes, ablations")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="these kinds instead of a group")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3], help="of the sweep")
    parser.add_argument("--sweep-tokens", type=float, default=8e6, help="of each cell of the sweep")
    parser.add_argument("--train-tokens", type=float, default=40e6, help="of each final cell")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16_384, 32_768])
    parser.add_argument("--eval-tokens", type=int, default=524_288, help="held-out tokens of each measurement")
    parser.add_argument("--batch-tokens", type=int, default=TRAINING.batch_tokens, help="of a step")
    parser.add_argument("--micro-tokens", type=int, default=0, help="tokens of one forward pass, where memory is short")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--shared", action="store_true", help="others use the GPU too: no tokens/s are written down")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long, with what was begun saved")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plan", action="store_true", help="print which cells are done, and end")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models on made-up tokens, to see that all of it runs"
    )
    options = parser.parse_args(arguments)
    options.kinds = options.kinds or list(GROUPS[options.group])
    if options.quick:
        options.contexts, options.eval_tokens, options.seeds = [32, 64, 128], 1024, min(options.seeds, 2)
        options.sweep_tokens, options.train_tokens, options.rates = 512, 1024, [2e-3, 8e-3]
    options.sweep_tokens, options.train_tokens = int(options.sweep_tokens), int(options.train_tokens)
    return options


def main() -> None:
    options = options_of()
    race = Race(options)
    for kind in options.kinds:
        reason = why_not(kind, race.device)
        if reason:
            sys.stdout.write(f"{kind} is left out: {reason}.\n")
    if options.plan:
        for cell in race.plan():
            sys.stdout.write(f"{'done' if cell.name in race.cells else 'to do'}  {cell.name}\n")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: setattr(race, "interrupted", True))
    signal.signal(signal.SIGINT, lambda *_: setattr(race, "interrupted", True))
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    race.open()
    try:
        race.run()
        left = ""
    except Stopped:
        left = "; not all is done: the same command goes on"
    race.write()
    if race.table():
        finals = [c for c in race.cells.values() if c["final"] and c["tokens"] == options.train_tokens]
        draw(race.table(), finals, options.out / "compare.png", options.quick)
    sys.stdout.write(f"{len(race.cells)} cells in {race.file}{left}\n")
    if race.broken:
        raise SystemExit(f"Left out, for the reasons above: {', '.join(race.broken)}.")


if __name__ == "__main__":
    main()
