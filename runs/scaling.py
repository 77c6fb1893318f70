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


def settings(options: argparse.Namespace, way: str, ranks: int, check: bool) -> TrainConfig:
    """One pass a rank and step; a check reads the same batch with every number of ranks."""
    tokens = 2 * max(options.ranks) * options.seq_len if check else ranks * options.tokens
    shared = way == "context"
    return TrainConfig(
        seq_len=tokens if shared else options.seq_len, batch_tokens=tokens, micro_tokens=tokens if shared else tokens // ranks,
        parallel="ddp" if shared else way, context_parallel=ranks if shared else 1, steps=3 if check else options.steps,
        warmup_steps=0, lr=1e-3, dtype="float32" if check or options.quick else "bfloat16", spike=0.0,
        compile=not check and not options.quick, recompute=options.recompute, eval_every=0, save_every=0,
    )  # fmt: skip


def work(options: argparse.Namespace) -> None:
    """What each rank does: of every way the check, then the timed steps; the first rank writes what it saw."""
    device = local_device(torch.device(options.device))
    size = shape(options)
    numbers = np.random.default_rng(0).integers(0, size.vocab_size, 8 * max(options.ranks) * options.tokens + 1)
    data = Tokens([numbers.astype(np.uint16)], np.array([0, len(numbers)]))
    everything: dict[str, Any] = {}
    for way in options.ways:
        ranks, found = join(options.worker if way == "context" else 1, device), {}
        for name, check in (("check", True), ("timed", False)):
            config, folder = settings(options, way, options.worker, check), options.out / way / name
            torch.compiler.reset()
            torch.manual_seed(0)
            model = Mamba3LM(size)
            trainer = Trainer(model, config, folder, data=Data(data, None, config, ranks), device=device, ranks=ranks)
            trainer.saver.save = lambda *_: None  # type: ignore[method-assign]  # nothing of this is kept
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer.run()
            if ranks.first:
                steps = read_metrics(folder / METRICS)
                found[name] = {
                    "losses": [line["loss"] for line in steps],
                    "seconds": [line["seconds"] for line in steps],
                }
                found[name]["tokens"] = config.batch_tokens
                found[name]["memory_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        if ranks.first:
            everything[way] = found
            (options.out / "found.json").write_text(json.dumps(everything))
    leave()


def measure(options: argparse.Namespace, world: int) -> dict[str, Any]:
    """Every way with so many ranks, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["--worker", world, "--ways", *options.ways, "--out", folder, "--device", options.device]
        own += [
            "--model",
            options.model,
            "--tokens",
            options.tokens,
            "--seq-len",
            options.seq_len,
            "--steps",
            options.steps,
        ]
        own += ["--ranks", *options.ranks, *(["--quick"] if options.quick else [])]
        own += ["--recompute"] if options.recompute else []
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world),
            __file__,
        ]
        done = subprocess.run([*launch, *map(str, own)], capture_output=True, text=True, check=False)
        file = Path(folder) / "found.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        if done.returncode:
            failed = next((way for way in options.ways if way not in found), "the end")
            sys.stderr.write(f"{failed} on {world} ranks failed:\n{done.stdout[-2000:]}{done.stderr[-6000:]}\n")
        return found


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
    worlds: dict[int, Any] = {}
    for world in sorted({1, *options.ranks}, reverse=True):  # the most GPUs first: then all but one are free again
        worlds[world] = measure(options, world)
        sys.stdout.write(f"{world} ranks are measured\n")
        sys.stdout.flush()
    for way in options.ways:
        for world, everything in sorted(worlds.items()):
            if way not in everything or way not in worlds[1]:
                continue
            found, alone = everything[way], worlds[1][way]
            worst = max(abs(a / b - 1) for a, b in zip(found["check"]["losses"], alone["check"]["losses"], strict=True))
            if worst > AGREE:
                raise SystemExit(
                    f"{way} on {world} ranks must train as one process does, but a loss differs by {worst:.2g}."
                )
            seconds, rate = speed_of(found["timed"])
            share = rate / (world * speed_of(alone["timed"])[1])
            rows.append(
                {"way": way, "ranks": world, "tokens_per_second": rate, "seconds": seconds, "share_of_linear": share,
                 "tokens": found["timed"]["tokens"], "memory_bytes": found["timed"]["memory_bytes"], "loss_difference": worst}
            )  # fmt: skip
            sys.stdout.write(f"{way} on {world}: {rate:,.0f} tokens/s, {share:.0%} of linear\n")
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    facts = {"quick": options.quick, "model": options.model, "device": gpu, "torch": torch.__version__, "rows": rows}
    replace_file(options.out / "scaling.json", (json.dumps(facts, indent=1) + "\n").encode())
    missing = [f"{way} on {world}" for way in options.ways for world in worlds if way not in worlds[world]]
    if missing:
        raise SystemExit(f"Not measured, for the reasons above: {', '.join(missing)} ranks.")


def speed_of(timed: dict[str, Any]) -> tuple[float, float]:
    """(median seconds of a step, the first ten left out, tokens/s)."""
    seconds = statistics.median(timed["seconds"][10:] or timed["seconds"])
    return seconds, timed["tokens"] / seconds


if __name__ == "__main__":
    main()
