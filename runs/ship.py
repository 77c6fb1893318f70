"""The small model that ships: trained on the books, measured, exported in bfloat16 with its tokenizer and a card.

    python runs/books.py build --books BOOKS --out tokens
    python runs/ship.py --tokens tokens --out ship --plan-seconds 1500     # a GPU; killed, the same command goes on
    python runs/ship.py --out smoke --quick                                  # the same path in a minute on a CPU

The first call times a few steps and plans as many as take --plan-seconds (or takes --steps); the plan is kept in OUT/plan.json.
Every call, finished or not, leaves OUT/model: config.json, tokenizer.json, weights in files below 16 MiB, README.md with what
was measured, and result.json. The learning rate is constant and falls over the last fifth (warm-up, stable, decay).
"""

import argparse
import dataclasses
import json
import math
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from books import read
from ship_card import card
from tokenizers import Tokenizer
from windows import Windows, spread_starts

from mamba3 import Mamba3Config, Mamba3LM
from mamba3.ops.state_file import replace_file
from mamba3.train import Reporter, TrainConfig, Trainer, checkpoint
from mamba3.train.data import Data
from mamba3.train.evaluate import evaluate
from mamba3.train.objective import Objective
from mamba3.train.optim import build_optimizer
from mamba3.train.report import METRICS, read_metrics
from mamba3.train.store import Tokens
from mamba3.train.tokenizer import FILE_NAME, byte_tokenizer, encode, load_tokenizer, token_bytes

SHARD_BYTES, MOST_BYTES = 16_500_000, 48_000_000  # of one file, below 16 MiB; of all weights
SHAPE: dict[str, Any] = {"d_model": 384, "layers": ("mamba3",) * 12, "d_state": 64, "headdim": 64}
INNER = {1: 640, 4: 512}  # the MLP's width for SISO and for MIMO of rank 4: the parameters match
TRAINING = TrainConfig(
    layout="rows", seq_len=2048, batch_tokens=65_536, lr=4e-3, schedule="wsd", decay_fraction=0.2, min_lr_fraction=0.02,
    dtype="bfloat16", compile=True, eval_every=250, eval_tokens=262_144, save_every=100, keep=2,
)  # fmt: skip
QUICK_SHAPE = {"d_model": 32, "layers": ("mamba3",) * 2, "d_state": 8, "headdim": 16}
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
PROMPT = "It was a dark evening in November, and"


def shape(vocabulary: int, rank: int, quick: bool) -> Mamba3Config:
    sizes = QUICK_SHAPE if quick else SHAPE
    return Mamba3Config(vocab_size=vocabulary, mimo_rank=rank, d_intermediate=INNER[rank] if not quick else 64, **sizes)


def parts_of(options: argparse.Namespace) -> tuple[dict[str, Tokens], Tokenizer]:
    """Training, validation and test tokens, and what they mean; made up for a quick run."""
    if options.quick:
        numbers = np.random.default_rng(0).integers(32, 120, 12_000).astype(np.uint16)
        return dict.fromkeys(("train", "val", "test"), Tokens([numbers], np.array([0, 7000, 12_000]))), byte_tokenizer()
    return {part: read(options.tokens, part) for part in ("train", "val", "test")}, load_tokenizer(options.tokens)


def seconds_per_step(model: Mamba3LM, config: TrainConfig, data: Data, device: torch.device) -> float:
    """Median time of a step, its first ones, which compile, left out; the model given is not changed."""
    probe = Mamba3LM(model.config).to(device)
    if config.compile:
        probe.compile_around_scan()
    objective, optimizer = Objective(probe, getattr(torch, config.dtype)), build_optimizer(probe, config)
    times = []
    for step in range(12):
        began = time.perf_counter()
        for _, batch in data.passes(step):
            loss, _ = objective(batch.to(device))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return statistics.median(times[4:])


def planned_steps(options: argparse.Namespace, model: Mamba3LM, config: TrainConfig, data: Data, device: Any) -> int:
    """From the plan that an earlier call made, or made now."""
    file = options.out / "plan.json"
    if not file.is_file():
        each = None if options.steps else seconds_per_step(model, config, data, device)
        steps = options.steps or max(20, int(options.plan_seconds / (each or 1)))
        replace_file(file, json.dumps({"steps": steps, "seconds_per_step": each}).encode())
    plan = json.loads(file.read_text())
    if options.steps and plan["steps"] != options.steps:
        raise SystemExit(
            f"{file} is for {plan['steps']} steps, not {options.steps}; leave out --steps or remove the folder."
        )
    return plan["steps"]


class Line(Reporter):
    """A line every twenty seconds."""

    told = 0.0

    def stepped(self, report: Any) -> None:
        if time.monotonic() - self.told > 20 or report.skipped:
            self.told = time.monotonic()
            note = f", not taken: {report.skipped}" if report.skipped else ""
            speed = report.tokens / report.seconds
            sys.stderr.write(f"step {report.step}, loss {report.loss:.4f}, {speed:,.0f} tokens/s{note}\n")

    def evaluated(self, step: int, evaluation: Any) -> None:
        sys.stderr.write(f"step {step}, validation {evaluation.loss:.4f}\n")


def measure(model: Mamba3LM, parts: dict[str, Tokens], sizes: np.ndarray | None, options: Any, device: Any) -> dict:
    """Loss, perplexity and bits per byte of the test books at each context, of the weights as they ship."""
    objective = Objective(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
    contexts = CONTEXTS if not options.quick else (32, 64)
    starts = spread_starts(parts["test"], max(contexts), 524_288 if not options.quick else 512)
    found = {}
    for length in contexts:
        batches = Windows(parts["test"], starts, max(contexts), length).batches(max(1, 65_536 // length))
        result = evaluate(objective, batches, device=device, sizes=sizes)
        found[str(length)] = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    return found


def deliver(trainer: Trainer, parts: dict[str, Tokens], tokenizer: Tokenizer, options: Any, device: Any) -> dict:
    """OUT/model, whole or as it was: bfloat16 weights read back and measured, the tokenizer, the card."""
    place, building = options.out / "model", options.out / ".model"
    shutil.rmtree(building, ignore_errors=True)
    model = trainer.saver.whole_model(trainer.model)
    assert isinstance(model, Mamba3LM)
    half = Mamba3LM.from_weights(model.config, {k: v.bfloat16() for k, v in model.state_dict().items()})
    half.save_pretrained(building, max_shard_size=SHARD_BYTES)
    tokenizer.save(str(building / FILE_NAME))
    weights = [file.stat().st_size for file in building.glob("*.safetensors")]
    if sum(weights) > MOST_BYTES or max(weights) > 2**24:
        raise SystemExit(f"the weights must be at most {MOST_BYTES:,} bytes in files below 16 MiB, but are {weights}.")
    shipped = Mamba3LM.from_pretrained(building).float().to(device).eval()
    # On a GPU the sample is written with bfloat16 weights, because float32 kernels take minutes to compile.
    writer = Mamba3LM.from_pretrained(building, device).eval() if device.type == "cuda" else shipped
    steps = [line for line in read_metrics(trainer.folder / METRICS) if line["kind"] == "step"]
    prompt = torch.tensor([encode(tokenizer, [PROMPT])[0].tolist()], device=device)
    written = writer.generate(prompt, max_new_tokens=120, temperature=0.8, top_p=0.95, seed=0).tokens[0].tolist()
    result = {
        "quick": options.quick, "parameters": shipped.num_parameters(), "bytes": sum(weights),
        "step": trainer.step, "steps": trainer.config.steps, "tokens": trainer.step * trainer.config.batch_tokens,
        "corpus_tokens": parts["train"].targets, "rank": options.rank, "lr": trainer.config.lr,
        "batch_tokens": trainer.config.batch_tokens, "seq_len": trainer.config.seq_len, "dtype": trainer.config.dtype,
        "train_loss": statistics.fmean(line["loss"] for line in steps[-50:]), "skipped": steps[-1]["skips"],
        "tokens_per_second": statistics.median(line["tokens"] / line["seconds"] for line in steps[5:] or steps),
        "test": measure(shipped, parts, token_bytes(tokenizer), options, device),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "state_bytes": shipped.init_state(1).nbytes, "sample": [PROMPT, tokenizer.decode(written[prompt.shape[1] :])],
    }  # fmt: skip
    (building / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (building / "README.md").write_text(card(result, model.config))
    shutil.rmtree(place, ignore_errors=True)
    building.rename(place)
    return result


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=Path("tokens"), help="folder of runs/books.py")
    parser.add_argument("--out", type=Path, default=Path("ship"))
    parser.add_argument("--rank", type=int, choices=tuple(INNER), default=4, help="1 is SISO, 4 MIMO; equal parameters")
    parser.add_argument("--lr", type=float, default=TRAINING.lr)
    parser.add_argument("--micro-tokens", type=int, default=0, help="tokens of one forward pass, where memory is short")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps of the whole run")
    length.add_argument("--plan-seconds", type=float, default=1200, help="as many steps as take so long here")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop training after so long, one step at least"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model on made-up tokens, to see that all of it runs"
    )
    return parser.parse_args(arguments)


def main() -> None:
    options, began, asked = options_of(), time.monotonic(), []
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if options.device == "auto" else options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    parts, tokenizer = parts_of(options)
    config = dataclasses.replace(TRAINING, lr=options.lr, micro_tokens=options.micro_tokens, compile=not options.eager)
    if options.quick:
        config = dataclasses.replace(config, seq_len=32, batch_tokens=128, dtype="float32", compile=False, save_every=5,
                                     eval_every=10, eval_tokens=256)  # fmt: skip
    config = dataclasses.replace(config, steps=10_000)  # until it is planned
    torch.manual_seed(config.seed)
    model = Mamba3LM(shape(tokenizer.get_vocab_size(with_added_tokens=True), options.rank, options.quick))
    data = Data(parts["train"], parts["val"], config)
    steps = planned_steps(options, model, config, data, device)
    config = dataclasses.replace(config, steps=steps, warmup_steps=min(steps // 20, 200))
    newest = max(checkpoint.list_checkpoints(options.out / "run"), default=None)
    identity = {"train": config.trajectory(), "model": model.config.to_dict()}
    if newest is not None:
        checkpoint.verify(newest)
        stored = checkpoint.read_card(newest).identity
        checkpoint.check_identity(stored, json.loads(json.dumps(identity)), newest)
    trainer = Trainer(
        model, config, options.out / "run", data=data, token_sizes=token_bytes(tokenizer), identity=identity,
        device=device, reporter=Line(), resume_from=newest,
    )  # fmt: skip
    before = trainer.step  # a call takes one step at least, so that there is something to deliver
    trainer.run(lambda: trainer.step > before and (bool(asked) or time.monotonic() - began > options.seconds))
    result = deliver(trainer, parts, tokenizer, options, device)
    left = "" if trainer.step == config.steps else "; not all is done: the same command goes on"
    best = min(result["test"].items(), key=lambda pair: pair[1]["perplexity"])
    sys.stdout.write(
        f"step {trainer.step} of {config.steps}: {result['parameters']:,} parameters, {result['bytes']:,} bytes, test "
        f"perplexity {best[1]['perplexity']:.2f} at {int(best[0]):,} tokens; {options.out / 'model'}{left}\n"
    )


if __name__ == "__main__":
    main()
