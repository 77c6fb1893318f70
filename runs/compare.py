"""Mamba-3 against the Transformer, Mamba-2 and gated DeltaNet at equal parameters and tokens: sweep, seeds, one table.

    python runs/books.py build --books BOOKS --out tokens
    python runs/compare.py --tokens tokens --out compare             # the whole comparison; a GPU is wanted
    python runs/compare.py --tokens tokens --out compare --plan      # what is done and what is left
    python runs/compare.py --out smoke --quick                       # the same path in a minute on a CPU; means nothing

Each kind is trained for a short sweep of learning rates, the same for all, then at its best rate for the whole budget with
each seed. Cells come in the order in which they are worth most (`worth`): all sweeps, then seed 0 of the main kinds, seed 1,
the state sizes, ... A worker runs on each GPU (--gpus, --each); the same command started more than once over one OUT shares the
cells too. A worker takes the first cell that nobody has, of the kind that it compiled last where that is worth as much.
May be stopped (--seconds, Ctrl-C) or killed at any moment: the same command goes on, in the middle of a cell where its folder
is still there, else from the cell's beginning. OUT/compare.json is the only file that must be kept: it holds every finished
cell and is rewritten after each; on another machine give it back with --known. A cell's name is its settings; one of another
number of training tokens is not taken for it.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from books import read, some_shards
from claims import Workers, alone, claim, devices, orphaned
from compare_cell import WARMUP, Cell, Line, curve, speed, spread_of
from compare_figure import draw
from compare_options import options_of
from contestants import MAIN, STATES, Contestant, Size, kernel_of, sound_kernels, why_not
from windows import Windows, spread_starts

from mamba3.ops.state_file import replace_file
from mamba3.train import NonFiniteError, TrainConfig, Trainer, checkpoint
from mamba3.train.data import Data
from mamba3.train.evaluate import evaluate
from mamba3.train.rows import Rows
from mamba3.train.store import Tokens
from mamba3.train.tokenizer import load_tokenizer, token_bytes

FULL, QUICK = Size(vocab_size=8192), Size(vocab_size=64, d_model=32, layers=2, inner=64, headdim=16, d_state=8)
TRAINING = TrainConfig(
    layout="rows", seq_len=2048, batch_tokens=65_536, dtype="bfloat16", compile=True, min_lr_fraction=0.1,
    weight_decay=0.1, betas=(0.9, 0.95), clip_norm=1.0, eval_every=0, eval_tokens=0, save_every=200, keep=1, graph=True,
)  # fmt: skip
QUICK_TRAINING = dataclasses.replace(
    TRAINING, seq_len=32, batch_tokens=128, dtype="float32", compile=False, save_every=2, graph=False
)
POLL = 0.5  # seconds between two looks at what the other workers are doing


class Stopped(Exception):
    """The time that was given is over, or Ctrl-C: what was begun is saved."""


def parent_of(kind: str) -> str:
    """The main kind whose sweep tells a kind's rate."""
    if kind in MAIN:
        return kind
    return next((main for main in MAIN if kind.startswith(f"{main}-n") and kind in STATES), "mamba3-siso")


def worth(kind: str, seed: int) -> int:
    """Which final cells come first: one seed of everything that is claimed before the last seeds of what is claimed."""
    order = {"main": (0, 1, 3), "states": (2, 5, 6), "ablations": (4, 7, 8)}
    group = "main" if kind in MAIN else "states" if kind in STATES else "ablations"
    return order[group][seed] if seed < 3 else 9 + seed


class Race:
    """The comparison's state: finished cells, data, the clock."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.interrupted = options, False
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(automatic if options.device == "auto" else options.device)
        self.training, self.size = (QUICK_TRAINING, QUICK) if options.quick else (TRAINING, FULL)
        if not options.quick:
            compiled = not options.eager
            self.training = dataclasses.replace(
                self.training,
                batch_tokens=options.batch_tokens,
                micro_tokens=options.micro_tokens,
                compile=compiled,
                graph=not options.no_graph,
            )
        self.file = options.out / "compare.json"
        self.cells: dict[str, dict[str, Any]] = {}
        self.data: dict[str, Tokens] = {}
        self.broken: list[str] = []  # kinds that raised in this call
        self.compiled: str | None = None  # the kind that torch.compile saw last
        self.sizes: np.ndarray | None = None
        self.corpus: int | None = None  # tokens that cells are trained on, once they are opened
        self.refresh()

    def open(self) -> None:
        """The three parts, and the bytes that tokens stand for."""
        if self.options.quick:
            numbers = np.random.default_rng(0).integers(0, 64, 12_000).astype(np.uint16)
            self.data = dict.fromkeys(("train", "val", "test"), Tokens([numbers], np.array([0, 7000, 12_000])))
            return
        self.data = {part: read(self.options.tokens, part) for part in ("train", "val", "test")}
        if self.options.shards:
            there = len(self.data["train"].shards)
            if there < self.options.shards:
                raise SystemExit(
                    f"--shards {self.options.shards} were asked for, but {there} are there; unpack the others."
                )
            self.data["train"] = some_shards(self.data["train"], 0, self.options.shards)
        self.corpus = int(self.data["train"].targets)
        tokenizer = load_tokenizer(self.options.tokens)
        self.size = dataclasses.replace(self.size, vocab_size=tokenizer.get_vocab_size(with_added_tokens=True))
        self.sizes = token_bytes(tokenizer)

    def over(self) -> bool:
        return self.interrupted or time.time() > self.options.until or orphaned(self.options.worker)

    def refresh(self) -> None:
        """The cells that are finished by now, here or in another process; none of another number of training tokens."""
        for known in (*self.options.known, self.file):
            if known.is_file():
                found = json.loads(known.read_text())["cells"]
                self.cells |= {name: cell for name, cell in found.items() if self.fits(cell)}
        self.cells = {name: cell for name, cell in self.cells.items() if self.fits(cell)}

    def fits(self, cell: dict[str, Any]) -> bool:
        """Whether a cell is of the training tokens at hand, as far as it and we know them."""
        return None in (self.corpus, cell.get("corpus_tokens")) or cell["corpus_tokens"] == self.corpus

    def plan(self) -> list[Cell]:
        """Every cell in order of worth, as far as the sweeps that are done tell their rates."""
        options = self.options
        kinds = [k for k in options.kinds if why_not(k, self.device) is None and k not in self.broken]
        cells = [self.cell(kind, rate, 0, final=False) for kind in kinds for rate in self.rates_of(kind)]
        for kind, seed in sorted(((k, s) for s in range(options.seeds) for k in kinds), key=lambda pair: worth(*pair)):
            best = self.best_rate(kind)
            if best is None and parent_of(kind) not in options.kinds:
                raise SystemExit(self.missing_sweep(kind))
            if best is not None:
                cells.append(self.cell(kind, best, seed, final=True))
        return cells

    def in_turn(self, todo: list[Cell]) -> list[Cell]:
        """Cells of the same worth as the first with those of the kind that was compiled last in front, then the others."""
        if not todo:
            return []

        def rank(cell: Cell) -> int:
            return worth(cell.kind, cell.seed) if cell.final else -1

        return sorted(todo, key=lambda cell: (rank(cell), cell.kind != self.compiled))

    def cell(self, kind: str, rate: float, seed: int, *, final: bool) -> Cell:
        """A cell of the lengths and the batch that were asked for."""
        tokens = self.options.train_tokens if final else self.options.sweep_tokens
        settings = {"batch_tokens": self.training.batch_tokens, "warmup": self.options.warmup}
        return Cell(kind, rate, seed, tokens, final=final, **settings)

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
        """All cells, as many as other processes leave to this one. Raises Stopped when the time is over."""
        while True:
            self.refresh()
            todo = [cell for cell in self.plan() if cell.name not in self.cells]
            if not todo:
                return
            if self.over():
                raise Stopped
            if not any(self.attempt(cell) for cell in self.in_turn(todo)):
                time.sleep(POLL)  # others are at all of it, and what comes next may hang on what they find

    def attempt(self, cell: Cell) -> bool:
        """Train a cell unless another process is at it, or has just finished it."""
        with claim(self.options.out / "claims" / cell.name) as mine:
            if not mine:
                return False
            self.refresh()
            if cell.name in self.cells:
                return True
            try:
                with sound_kernels(cell.kind, self.device):
                    result = self.train(cell)
            except Stopped:
                raise
            except Exception:  # noqa: BLE001  # another library's failure must not cost the other kinds their hours
                sys.stderr.write(
                    f"{cell.name} failed, and {cell.kind} is left out of this call:\n{traceback.format_exc()}"
                )
                self.broken.append(cell.kind)
                return True
            self.write({cell.name: result})
            return True

    def train(self, cell: Cell) -> dict[str, Any]:
        """Train and measure one cell; {"failed": why} where it diverged."""
        steps = max(2, cell.tokens // self.training.batch_tokens)
        config = dataclasses.replace(
            self.training,
            steps=steps,
            lr=cell.rate,
            seed=cell.seed,
            warmup_steps=min(steps - 1, round(cell.warmup * steps)),
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
        facts = {**dataclasses.asdict(cell), "corpus_tokens": self.corpus}
        try:
            trainer = Trainer(
                model, config, folder, data=Data(self.data["train"], None, config), device=self.device,
                reporter=Line(cell.name), identity={"cell": cell.name}, resume_from=newest,
            )  # fmt: skip
            if trainer.run(self.over).stopped:
                raise Stopped
        except NonFiniteError as error:
            return {**facts, "failed": str(error)}
        objective, sample = trainer.objective, rows.sample(self.options.eval_tokens)
        with torch.compiler.set_stance("force_eager"):  # compiled for other shapes, training would be compiled for any
            val = evaluate(objective, sample, device=self.device, sizes=self.sizes)
        result = {
            **facts, "steps": steps, "val_loss": val.loss, "val_bits_per_byte": val.bits_per_byte,
            "parameters": model.num_parameters(), "inner": model.inner, **speed(folder), "curve": curve(folder),
            "memory_bytes": {str(n): model.memory_bytes(n) for n in self.options.contexts},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu", "torch": torch.__version__,
            "scan": kernel_of(cell.kind, self.device, getattr(torch, config.dtype)), "graph": trainer.captured is not None,
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
            with torch.compiler.set_stance("force_eager"):
                found[str(length)] = evaluate(objective, batches, device=self.device, sizes=self.sizes).perplexity
        return found

    def write(self, finished: dict[str, dict[str, Any]] | None = None) -> None:
        """compare.json with these cells beside all that other processes have finished, whole or as it was."""
        with alone(self.options.out / "claims" / "compare.json"):
            self.refresh()
            self.cells |= finished or {}
            self._replace()

    def _replace(self) -> None:
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
            wanted["warmup"] = self.options.warmup
            done = [c for c in done if wanted.items() <= ({"warmup": WARMUP} | c).items()]
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


def main() -> None:
    options = options_of(__doc__)
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
    gpus = devices(race.device.type)[: options.gpus]
    count = (len(gpus) or options.gpus or 1) * options.each
    if options.worker is None and count > 1:
        failed = Workers([__file__, *sys.argv[1:], "--until", str(options.until)], count, gpus, options.out).wait()
        race.refresh()
        report(race, failed)
        return
    signal.signal(signal.SIGTERM, lambda *_: setattr(race, "interrupted", True))
    signal.signal(signal.SIGINT, lambda *_: setattr(race, "interrupted", True))
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    race.open()
    with suppress(Stopped):
        race.run()
    report(race, [])


def report(race: Race, failed: list[Path]) -> None:
    """compare.json, the figure and a line of what there is; SystemExit where a kind or a worker failed."""
    options = race.options
    race.write()
    if race.table() and options.worker is None:
        finals = [c for c in race.cells.values() if c["final"] and c["tokens"] == options.train_tokens]
        draw(race.table(), finals, options.out / "compare.png", options.quick)
    done = all(cell.name in race.cells for cell in race.plan())
    left = "" if done else "; not all is done: the same command goes on"
    sys.stdout.write(f"{len(race.cells)} cells in {race.file}{left}\n")
    if race.broken:
        raise SystemExit(f"Left out, for the reasons above: {', '.join(race.broken)}.")
    if failed:
        raise SystemExit(f"Workers failed, for the reasons in {', '.join(map(str, failed))}.")


if __name__ == "__main__":
    main()
