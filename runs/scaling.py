"""Throughput of training on 1, 2, ... GPUs of one machine and its share of linear scaling: DDP, FSDP2, one sequence shared.

    python runs/scaling.py --out scaling --ranks 1 2          # NCCL, one process a GPU
    python runs/scaling.py --out smoke --quick                # gloo, CPU processes: that it runs, not how fast

Before anything is timed, every way trains three float32 steps of one fixed batch on all ranks, and its losses must be those of
one process. Then each rank has the same work whatever their number (weak scaling): a replicated or sharded model reads as
many tokens a rank, a shared sequence is as many times longer. Writes OUT/scaling.json: tokens/s, memory, share of linear.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mamba3 import Mamba3Config, Mamba3LM, preset
from mamba3.ops.state_file import replace_file
from mamba3.train import TrainConfig, Trainer
from mamba3.train.data import Data
from mamba3.train.ranks import join, leave, local_device
from mamba3.train.report import METRICS, read_metrics
from mamba3.train.store import Tokens

WAYS = ("ddp", "fsdp", "context")
VOCABULARY = 32_000
AGREE = 1e-4  # relative, of float32 losses whose sums are taken in another order


def shape(options: argparse.Namespace) -> Mamba3Config:
    if options.quick:
        return Mamba3Config(vocab_size=64, d_model=16, layers=("mamba3",) * 2, d_state=8, headdim=8, d_intermediate=16)
    return preset(options.model, vocab_size=VOCABULARY)


def settings(options: argparse.Namespace, ranks: int, check: bool) -> TrainConfig:
    """One pass a rank and step; a check reads the same batch with every number of ranks."""
    tokens = 2 * max(options.ranks) * options.seq_len if check else ranks * options.tokens
    shared = options.way == "context"
    return TrainConfig(
        seq_len=tokens if shared else options.seq_len, batch_tokens=tokens, micro_tokens=tokens if shared else tokens // ranks,
        parallel="ddp" if shared else options.way, context_parallel=ranks if shared else 1, steps=3 if check else options.steps,
        warmup_steps=0, lr=1e-3, dtype="float32" if check or options.quick else "bfloat16", spike=0.0,
        compile=not check and not options.quick, recompute=options.recompute, eval_every=0, save_every=0,
    )  # fmt: skip


def work(options: argparse.Namespace) -> None:
    """What each rank does: the check, then the timed steps; the first rank writes what it saw."""
    device = local_device(torch.device(options.device))
    shared = options.way == "context"
    world = options.worker
    ranks = join(world if shared else 1, device)
    numbers = np.random.default_rng(0).integers(
        0, shape(options).vocab_size, 8 * max(options.ranks) * options.tokens + 1
    )
    data, found = Tokens([numbers.astype(np.uint16)], np.array([0, len(numbers)])), {}
    for name, check in (("check", True), ("timed", False)):
        config = settings(options, world, check)
        torch.manual_seed(0)
        trainer = Trainer(
            Mamba3LM(shape(options)), config, options.out / name, data=Data(data, None, config, ranks), device=device,
            ranks=ranks,
        )  # fmt: skip
        trainer.saver.save = lambda *_: None  # type: ignore[method-assign]  # nothing of this is kept
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.run()
        if ranks.first:
            steps = read_metrics(options.out / name / METRICS)
            found[name] = {"losses": [line["loss"] for line in steps], "seconds": [line["seconds"] for line in steps]}
            found[name]["tokens"] = config.batch_tokens
            found[name]["memory_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    if ranks.first:
        (options.out / "found.json").write_text(json.dumps(found))
    leave()


def measure(options: argparse.Namespace, way: str, world: int) -> dict[str, Any]:
    """One way with so many ranks, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        own = [
            "--worker",
            str(world),
            "--way",
            way,
            "--out",
            folder,
            "--device",
            options.device,
            "--model",
            options.model,
        ]
        own += ["--tokens", str(options.tokens), "--seq-len", str(options.seq_len), "--steps", str(options.steps)]
        own += ["--ranks", *map(str, options.ranks), *(["--quick"] if options.quick else [])]
        own += ["--recompute"] if options.recompute else []
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        done = subprocess.run([*launch, __file__, *own], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way} on {world} ranks failed:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
        return json.loads((Path(folder) / "found.json").read_text())


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scaling"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--model", default="siso-180m", help="a preset of the paper")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a step, for each rank")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30, help="timed; the first ten are left out")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick and options.worker is None:
        options.tokens, options.seq_len, options.steps = 128, 32, 12
    return options


def main() -> None:
    options = options_of()
    if options.worker:
        work(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for way in options.ways:
        alone: dict[str, Any] = {}
        for world in sorted({1, *options.ranks}):
            found = measure(options, way, world)
            alone = alone or found
            worst = max(abs(a / b - 1) for a, b in zip(found["check"]["losses"], alone["check"]["losses"], strict=True))
            if worst > AGREE:
                raise SystemExit(
                    f"{way} on {world} ranks must train as one process does, but a loss differs by {worst:.2g}."
                )
            timed = found["timed"]
            seconds = statistics.median(timed["seconds"][10:] or timed["seconds"])
            rate = timed["tokens"] / seconds
            base = next((row["tokens_per_second"] for row in rows if row["way"] == way), rate)
            share = rate / (world * base)
            rows.append(
                {"way": way, "ranks": world, "tokens_per_second": rate, "seconds": seconds, "share_of_linear": share,
                 "tokens": timed["tokens"], "memory_bytes": timed["memory_bytes"], "loss_difference": worst}
            )  # fmt: skip
            sys.stdout.write(f"{way} on {world}: {rate:,.0f} tokens/s, {share:.0%} of linear\n")
            gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
            facts = {
                "quick": options.quick,
                "model": options.model,
                "device": gpu,
                "torch": torch.__version__,
                "rows": rows,
            }
            replace_file(options.out / "scaling.json", (json.dumps(facts, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
