"""The small model that ships: trained on the books, measured, exported in bfloat16 with its tokenizer and a card.

    python runs/books.py build --books BOOKS --out tokens
    python runs/ship.py --tokens tokens --out ship --plan-seconds 1500     # a GPU; killed, the same command goes on
    torchrun --nproc-per-node 2 runs/ship.py --tokens tokens --out ship --plan-seconds 800      # two of them
    python runs/ship.py --tokens tokens --out ship --plan-seconds 800 --extend      # later: a longer plateau, a new fall
    python runs/ship.py --out smoke --quick --steps 30                       # the same path in a minute on a CPU

The learning rate is constant, then falls over the last --fall of the run (warm-up, stable, decay). A plateau does not
depend on where it ends: the run lasts --steps steps, or --plan-seconds of the clock, and the fall is planned when it begins,
by the time that steps take. The checkpoint of the plateau's end stays; --extend goes on from it, on more books if there are.
Every call, finished or not, leaves OUT/model: config.json, the tokenizer, weights in files below 16 MiB, README.md with what
was measured, and result.json.
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
from books import read, some_shards
from compare_cell import curve
from ship_card import card
from tokenizers import Tokenizer
from windows import Windows, spread_starts

from mamba3 import Mamba3Config, Mamba3LM
from mamba3.ops.state_file import replace_file
from mamba3.text.settings import write_settings
from mamba3.train import Ranks, Reporter, TrainConfig, Trainer, checkpoint, join
from mamba3.train.data import Data
from mamba3.train.evaluate import evaluate
from mamba3.train.folder import new_folder
from mamba3.train.objective import Objective
from mamba3.train.ranks import leave, local_device
from mamba3.train.report import METRICS, read_metrics
from mamba3.train.store import Tokens
from mamba3.train.tokenizer import FILE_NAME, byte_tokenizer, encode, end_of_text, load_tokenizer, token_bytes

SHARD_BYTES, MOST_BYTES = 16_500_000, 48_000_000  # of one file, below 16 MiB; of all weights
SHAPE: dict[str, Any] = {"d_model": 384, "layers": ("mamba3",) * 12, "d_state": 64, "headdim": 64}
INNER = {1: 640, 4: 512}  # the MLP's width for SISO and for MIMO of rank 4: the parameters match
TRAINING = TrainConfig(
    layout="rows", seq_len=2048, batch_tokens=65_536, lr=2e-3, schedule="wsd", min_lr_fraction=0.02, warmup_steps=200,
    dtype="bfloat16", compile=True, eval_every=500, eval_tokens=262_144, save_every=500, keep=2,
)  # fmt: skip
ENDLESS = 10**9  # steps of a plateau whose end is not known yet
MARGIN, LATE = 1.06, 1.04  # of the time that a step of the fall may take, and of the whole time
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


def settings(options: argparse.Namespace) -> TrainConfig:
    """The recipe as long as its plateau is endless: --steps, or the clock, says later where the fall begins."""
    config = dataclasses.replace(
        TRAINING, lr=options.lr, batch_tokens=options.batch_tokens, micro_tokens=options.micro_tokens,
        compile=not options.eager, steps=ENDLESS, decay_fraction=1 / ENDLESS, warmup_steps=options.warmup_steps,
    )  # fmt: skip
    if options.quick:
        config = dataclasses.replace(config, seq_len=32, batch_tokens=128, dtype="float32", compile=False, save_every=5,
                                     eval_every=10, eval_tokens=256, warmup_steps=2)  # fmt: skip
    return config


def falling(config: TrainConfig, start: int, steps: int) -> TrainConfig:
    """The same with a fall from step `start` to the end of `steps` steps, in which only the last one is saved."""
    fraction = max(steps - start, 1) / steps
    return dataclasses.replace(config, steps=steps, decay_fraction=fraction, save_every=0)


class Plan:
    """Where the plateau ends; kept in OUT/plan.json once it is known, so that a fall that was killed goes on as it was."""

    def __init__(self, options: argparse.Namespace, began: float):
        self.options, self.began, self.file = options, began, options.out / "plan.json"

    def read(self) -> tuple[int, int] | None:
        """The steps at which the fall begins and ends; None where neither --steps nor a clock has told them yet."""
        wanted = self.options.steps
        if not self.file.is_file():  # the clock tells it in the end
            return None if wanted is None else (wanted - max(1, round(self.options.fall * wanted)), wanted)
        plan = json.loads(self.file.read_text())
        if wanted and plan["steps"] != wanted:
            raise SystemExit(
                f"{self.file} is for {plan['steps']} steps, not {wanted}; leave out --steps or remove the folder."
            )
        return plan["start"], plan["steps"]

    def over(self, step: int, warmup: int) -> bool:
        """Whether the clock says that the plateau, which begins with the warm-up, ends before this step."""
        return step > warmup and time.monotonic() - self.began > self.options.plan_seconds * (1 - self.options.fall)

    def late(self) -> bool:
        """Whether the steps of the fall take so much longer than they did that it is left off, to be gone on with."""
        by_clock = self.options.steps is None
        return by_clock and time.monotonic() - self.began > LATE * self.options.plan_seconds

    def by_clock(self, step: int, run: Path) -> tuple[int, int]:
        """A fall from this step on: as many steps as fit the time that is left, as fast as the last ones were."""
        taken = [line["seconds"] for line in read_metrics(run / METRICS) if line["kind"] == "step"][-200:]
        left = self.options.plan_seconds - (time.monotonic() - self.began)
        return step, step + max(1, int(left / (MARGIN * statistics.fmean(taken))))

    def keep(self, planned: tuple[int, int]) -> tuple[int, int]:
        """Remember what is planned."""
        replace_file(self.file, json.dumps(dict(zip(("start", "steps"), planned, strict=True))).encode())
        return planned


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
    """OUT/model, whole or as it was: bfloat16 weights read back and measured, the tokenizer, the card. On the first rank."""
    model = trainer.saver.copy
    assert isinstance(model, Mamba3LM)
    half = Mamba3LM.from_weights(model.config, {k: v.bfloat16() for k, v in model.state_dict().items()})
    with new_folder(options.out / "model") as building:
        half.save_pretrained(building, max_shard_size=SHARD_BYTES)
        tokenizer.save(str(building / FILE_NAME))
        write_settings(building, tokenizer, end_of_text(tokenizer))
        weights = [file.stat().st_size for file in building.glob("*.safetensors")]
        if sum(weights) > MOST_BYTES or max(weights) > 2**24:
            raise SystemExit(
                f"the weights must be at most {MOST_BYTES:,} bytes in files below 16 MiB, but are {weights}."
            )
        shipped = Mamba3LM.from_pretrained(building).float().to(device).eval()
        # On a GPU the sample is written with bfloat16 weights, because float32 kernels take minutes to compile.
        writer = Mamba3LM.from_pretrained(building, device).eval() if device.type == "cuda" else shipped
        prompt = torch.tensor([encode(tokenizer, [PROMPT])[0].tolist()], device=device)
        written = writer.generate(prompt, max_new_tokens=120, temperature=0.8, top_p=0.95, seed=0).tokens[0].tolist()
        result = facts(trainer, shipped, parts, options, device) | {
            "bytes": sum(weights), "state_bytes": half.init_state(1).nbytes,
            "test": measure(shipped, parts, token_bytes(tokenizer), options, device),
            "sample": [PROMPT, tokenizer.decode(written[prompt.shape[1] :])],
        }  # fmt: skip
        (building / "result.json").write_text(json.dumps(result) + "\n")
        (building / "README.md").write_text(card(result, model.config))
    return result


def facts(trainer: Trainer, shipped: Mamba3LM, parts: dict[str, Tokens], options: Any, device: Any) -> dict[str, Any]:
    """What the run was, for result.json and the card."""
    lines = read_metrics(trainer.folder / METRICS)
    steps = [line for line in lines if line["kind"] == "step"]
    end = trainer.config.steps if trainer.config.steps < ENDLESS else options.steps
    fall = round(trainer.config.decay_fraction * trainer.config.steps)
    return {
        "quick": options.quick, "parameters": shipped.num_parameters(), "rank": options.rank,
        "step": trainer.step, "steps": end, "fall": fall if trainer.config.steps < ENDLESS else 0,
        "warmup": trainer.config.warmup_steps, "tokens": trainer.step * trainer.config.batch_tokens,
        "corpus_tokens": parts["train"].targets, "books": {part: tokens.documents for part, tokens in parts.items()},
        "lr": trainer.config.lr, "batch_tokens": trainer.config.batch_tokens,
        "seq_len": trainer.config.seq_len, "dtype": trainer.config.dtype,
        "train_loss": statistics.fmean(line["loss"] for line in steps[-50:]), "skipped": steps[-1]["skips"],
        "tokens_per_second": statistics.median(line["tokens"] / line["seconds"] for line in steps[5:] or steps),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "devices": trainer.ranks.size,
        "torch": torch.__version__, "curve": curve(trainer.folder),
        "validation": [[line["step"], line["loss"]] for line in lines if line["kind"] == "val"],
    }  # fmt: skip


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=Path("tokens"), help="folder of runs/books.py")
    parser.add_argument("--out", type=Path, default=Path("ship"))
    parser.add_argument("--rank", type=int, choices=tuple(INNER), default=1, help="1 is SISO, 4 MIMO; equal parameters")
    parser.add_argument("--lr", type=float, default=TRAINING.lr)
    parser.add_argument("--warmup-steps", type=int, default=TRAINING.warmup_steps)
    parser.add_argument("--batch-tokens", type=int, default=TRAINING.batch_tokens, help="of a step, over all GPUs")
    parser.add_argument("--micro-tokens", type=int, default=0, help="tokens of one forward pass, where memory is short")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps of the whole run")
    length.add_argument("--plan-seconds", type=float, default=1200, help="plateau and fall together, from this call on")
    parser.add_argument(
        "--fall", type=float, default=0.2, help="share of the steps, or of the clock, in which the rate falls"
    )
    parser.add_argument("--extend", action="store_true", help="go on from the plateau of a run that has fallen already")
    parser.add_argument(
        "--shards", type=int, nargs=2, metavar=("FROM", "TO"), help="the plateau reads these shards alone, the fall all"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop training after so long, one step at least"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model on made-up tokens, to see that all of it runs"
    )
    return parser.parse_args(arguments)


def resumed(run: Path, plan: Plan, identity: dict[str, Any], extend: bool) -> Path | None:
    """The checkpoint to go on from; with `extend` that of the plateau, and what came after it is removed."""
    found, planned = checkpoint.list_checkpoints(run), plan.read()
    if extend and plan.file.is_file() and planned is not None:
        for place in found:
            if checkpoint.read_card(place).step > planned[0]:
                shutil.rmtree(place)
        plan.file.unlink()
        found = checkpoint.list_checkpoints(run)
        if not found:
            raise SystemExit(f"{run} holds no checkpoint of its plateau to extend; train it anew in another folder.")
    if not found:
        return None
    checkpoint.verify(found[-1])
    checkpoint.check_identity(checkpoint.read_card(found[-1]).identity, json.loads(json.dumps(identity)), found[-1])
    return found[-1]


def train(options: argparse.Namespace, ranks: Ranks, device: torch.device, began: float) -> tuple[Trainer, Any, Any]:
    """Plateau and fall, as far as this call goes: (trainer, the parts, the tokenizer)."""
    asked: list[bool] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    parts, tokenizer = parts_of(options)
    config, plan, run = settings(options), Plan(options, began), options.out / "run"
    torch.manual_seed(config.seed)
    model = Mamba3LM(shape(tokenizer.get_vocab_size(with_added_tokens=True), options.rank, options.quick))
    length = ("steps", "decay_fraction")  # a plateau is one and the same until it falls
    identity = {
        "train": {k: v for k, v in config.trajectory().items() if k not in length},
        "model": model.config.to_dict(),
    }
    newest = ranks.from_first(lambda: resumed(run, plan, identity, options.extend))
    planned = ranks.from_first(plan.read)
    done = 0 if newest is None else checkpoint.read_card(newest).step
    plateau = parts["train"] if options.shards is None else some_shards(parts["train"], *options.shards)
    if planned is not None and done > planned[0]:  # in the midst of its fall, or at its end
        config, plateau = falling(config, *planned), parts["train"]
    trainer = Trainer(
        model, config, run, data=Data(plateau, parts["val"], config, ranks), token_sizes=token_bytes(tokenizer),
        identity=identity, device=device, reporter=Line() if ranks.first else Reporter(), resume_from=newest, ranks=ranks,
    )  # fmt: skip

    def stopped() -> bool:  # a call takes one step at least, so that there is something to deliver
        return trainer.step > done and (bool(asked) or time.monotonic() - began > options.seconds)

    def ends() -> bool:
        return plan.over(trainer.step, config.warmup_steps) if planned is None else trainer.step >= planned[0]

    trainer.run(lambda: stopped() or (config.steps == ENDLESS and ends()))
    if config.steps == ENDLESS and ranks.agree(ends()) and not ranks.agree(stopped()):
        start, steps = ranks.from_first(lambda: plan.keep(planned or plan.by_clock(trainer.step, run)))
        trainer.data = Data(parts["train"], parts["val"], config, ranks)
        trainer.replan(falling(config, start, steps))
        trainer.run(lambda: stopped() or plan.late())
    return trainer, parts, tokenizer


def main() -> None:
    options, began = options_of(), time.monotonic()
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = local_device(torch.device(automatic if options.device == "auto" else options.device))
    ranks = join(1, device)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer, parts, tokenizer = train(options, ranks, device, began)
    whole = trainer.saver.whole_model(trainer.model)
    if whole is not None:
        result = deliver(trainer, parts, tokenizer, options, device)
        left = "" if trainer.step == trainer.config.steps else "; not all is done: the same command goes on"
        end = "" if result["steps"] is None else f" of {result['steps']}"
        best = min(result["test"].items(), key=lambda pair: pair[1]["perplexity"])
        sys.stdout.write(
            f"step {trainer.step}{end}: {result['parameters']:,} parameters, {result['bytes']:,} bytes, test "
            f"perplexity {best[1]['perplexity']:.2f} at {int(best[0]):,} tokens; {options.out / 'model'}{left}\n"
        )
    ranks.from_first(lambda: None)  # the others wait until all is written
    leave()


if __name__ == "__main__":
    main()
