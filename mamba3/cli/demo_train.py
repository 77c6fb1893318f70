"""`mamba3 demo-train`: train a small model on Python's own source, write with it, stop it, move it to another process.

Needs two cores and a few minutes; no GPU, no network. Every number that it shows is measured while it runs.
"""

import json
import statistics
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from mamba3.cli.console import console
from mamba3.cli.elsewhere import go_on_elsewhere, in_new_process
from mamba3.train.config import TrainConfig

if TYPE_CHECKING:
    from mamba3.lm import Mamba3Config
    from mamba3.train import Trainer

MODEL: dict[str, Any] = {"d_model": 192, "layers": ("mamba3",) * 2, "d_state": 32, "headdim": 64, "d_intermediate": 384}
TRAINING: dict[str, Any] = {
    "tokenizer": "bpe", "vocab_size": 1024, "seq_len": 256, "batch_tokens": 2048, "lr": 5e-3, "warmup_steps": 20,
    "eval_every": 50, "eval_tokens": 8_192, "save_every": 100,
}  # fmt: skip
STEPS = (100, 2000)  # however fast or slow the machine is
TIMING = 5.0  # seconds after which timing is not gone on with
PATIENCE = 1.6  # times the planned seconds, then training is left off
PROMPT = "\n    def __init__(self"
SAMPLE, CONTINUATION = 200, 60  # tokens
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9}
MARKS = (1_000, 200_000)  # tokens read when memory is measured


def demo_train(
    out: Annotated[Path, typer.Option(help="folder of the demonstration")] = Path("demo-run"),
    seconds: Annotated[int, typer.Option(help="time to train for, about", min=1)] = 90,
    restart: Annotated[bool, typer.Option("--restart", help="begin anew, whatever the folder holds")] = False,
) -> None:
    """Train, generate, save the state, resume it in a new process: all in a few minutes on two cores."""
    import torch

    began = time.perf_counter()
    torch.manual_seed(0)
    console.rule("1. Train on the Python standard library")
    trainer = _train(out, seconds, restart)
    place = trainer.folder / "model"
    torch.set_num_threads(1)  # one token at a time is too little work to share
    console.rule("2. Write Python")
    text, state = _write(place, out)
    console.rule("3. Stop, and go on in another process")
    go_on_elsewhere(str(place), text, state, SAMPLING, CONTINUATION)
    console.rule("4. Read on and on in the same memory")
    _read_on(place, trainer, out)
    console.rule("What next")
    _say_what_next(place, time.perf_counter() - began)


def shape(vocabulary: int) -> "Mamba3Config":
    from mamba3.lm import Mamba3Config

    return Mamba3Config(vocab_size=vocabulary, **MODEL)


# -- 1


def _train(out: Path, seconds: int, restart: bool) -> "Trainer":
    import torch

    from mamba3.cli.train import run_training
    from mamba3.train.report import METRICS, read_metrics

    out.mkdir(parents=True, exist_ok=True)
    corpus = _write_corpus(out / "corpus.jsonl")
    plan = _plan(out / "plan.json", seconds, restart)
    torch.set_num_threads(plan["threads"])
    config = TrainConfig(**TRAINING, steps=plan["steps"])
    trainer = run_training(
        corpus,
        out / "run",
        config,
        shape,
        start="restart" if restart else "auto",
        device="cpu",
        patience=PATIENCE * seconds,  # the machine may have become busy since the steps were planned
    )
    validations = [line for line in read_metrics(trainer.folder / METRICS) if line["kind"] == "val"]
    first, last = validations[0], validations[-1]
    table = Table("on held-out files", f"step {first['step']}", f"step {last['step']}")
    for label, key, digits in (("perplexity", "perplexity", 1), ("bits per byte", "bits_per_byte", 3)):
        table.add_row(label, f"{first[key]:,.{digits}f}", f"{last[key]:,.{digits}f}")
    console.print(table)
    console.print(f"Loss curve: {trainer.folder / 'loss.png'}")
    return trainer


def _write_corpus(path: Path) -> Path:
    """One JSON line for each module at the top of the standard library, in order of name."""
    from mamba3.ops.state_file import replace_file

    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*.py"))]
    if not texts:
        raise ValueError(f"the demonstration reads the standard library's source, but {folder} holds no .py file.")
    replace_file(path, "".join(json.dumps({"text": text}) + "\n" for text in texts if text).encode())
    return path


def _plan(path: Path, seconds: int, restart: bool) -> dict[str, int]:
    """Threads, and steps that take about `seconds` with them here.

    Found by timing once and then kept, so that an interrupted run is resumed as it was.
    """
    if path.is_file() and not restart:
        plan = json.loads(path.read_text())
        if plan["seconds"] != seconds:
            raise ValueError(
                f"a demonstration goes on as it was planned, but {path} is for {plan['seconds']} seconds, not {seconds}; "
                "leave out --seconds or give --restart."
            )
        return plan
    import torch

    from mamba3.ops.state_file import replace_file

    times = {threads: _seconds_per_step(threads) for threads in sorted({1, torch.get_num_threads()})}
    threads = min(times, key=lambda n: times[n])  # where others use the cores too, one thread may be the fastest
    steps = min(max(int(seconds / times[threads]), STEPS[0]), STEPS[1])
    timed = ", ".join(f"{step:.2f} s on {n} thread{'s'[: n > 1]}" for n, step in times.items())
    console.print(f"A step takes {timed} here; planned are {steps} steps, threads: {threads}.")
    plan = {"seconds": seconds, "steps": steps, "threads": threads}
    replace_file(path, json.dumps(plan).encode())
    return plan


def _seconds_per_step(threads: int) -> float:
    """Median time of a step on tokens of no meaning."""
    import torch

    from mamba3.lm import Mamba3LM
    from mamba3.train.objective import batch_loss
    from mamba3.train.optim import build_optimizer
    from mamba3.train.packing import Batch

    torch.set_num_threads(threads)
    config = TrainConfig(**TRAINING)
    assert config.vocab_size is not None
    model = Mamba3LM(shape(config.vocab_size))
    optimizer = build_optimizer(model, config)
    ids = torch.randint(config.vocab_size, (config.batch_tokens + 1,))
    bounds = torch.arange(0, config.batch_tokens + 1, config.seq_len, dtype=torch.int32)
    times: list[float] = []
    while len(times) < 3 or (len(times) < 10 and sum(times) < TIMING):
        began = time.perf_counter()
        batch_loss(model, Batch(ids[None, :-1], ids[1:], bounds), torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


# -- 2, 3


def _write(place: Path, out: Path) -> tuple[str, Path]:
    """Generate, save the state in the middle, go on: the text after the middle, and the file."""
    from mamba3.cli.models import load_model
    from mamba3.cli.session import Session
    from mamba3.lm.generate import Sampling
    from mamba3.train.tokenizer import TextStream, encode

    model, tokenizer = load_model(place, None, "cpu", None)
    session, stream, sampling = Session.new(model), TextStream(tokenizer), Sampling(**SAMPLING)
    session.generator.manual_seed(1)
    session.add(encode(tokenizer, [PROMPT])[0].tolist())
    began = time.perf_counter()
    sample = "".join(stream.push(token) for token in session.tokens(sampling, SAMPLE))
    speed = SAMPLE / (time.perf_counter() - began)
    console.print(Panel(f"[bold]{escape(PROMPT)}[/]{escape(sample)}", title=f"{SAMPLE} tokens, {speed:,.0f} tokens/s"))
    state = out / "state.safetensors"
    session.context = stream.context
    session.save(state)
    rest = "".join(stream.push(token) for token in session.tokens(sampling, CONTINUATION)) + stream.finish()
    return rest, state


# -- 4


def _read_on(place: Path, trainer: "Trainer", out: Path) -> None:
    import numpy as np

    tokens = out / "read.npy"
    np.save(tokens, trainer.data.tokens.read(0, MARKS[-1]))
    console.print(f"A new process reads {MARKS[-1]:,} tokens of source code from one state ...")
    began = time.perf_counter()
    found: list[Any] = json.loads(in_new_process("mamba3.cli.memory", str(place), str(tokens), *map(str, MARKS)))
    seconds = time.perf_counter() - began
    table = Table("tokens read", "state", "process (resident)")
    for read, state, resident in found:
        table.add_row(f"{read:,}", f"{state:,} bytes", f"{resident / 2**20:,.1f} MiB" if resident else "unknown here")
    console.print(table)
    (_, state_before, before), (_, state_after, after) = found
    same = "equal" if state_before == state_after else "NOT equal"
    line = f"State: {same}, {state_after:,} bytes."
    if before and after:
        line += f" Process: {(after - before) / before:+.2%} from {MARKS[0]:,} to {MARKS[-1]:,} tokens."
    console.print(f"{line} Done in {seconds:.1f} s, start of the process included.")


def _say_what_next(place: Path, seconds: float) -> None:
    console.print(
        f"All of this took {seconds:.0f} s. Try:\n"
        f"  mamba3 generate --model {place} --prompt 'class Node:' --max-new-tokens 300\n"
        "  mamba3 train YOUR_TEXT --out run --tokenizer bpe        (a file, a folder or JSON lines; Ctrl-C and go on)\n"
        "  mamba3 demo-train --restart --seconds 600               (the same, trained for longer)\n"
        "  mamba3 info                                             (devices, and what runs on them)",
        soft_wrap=True,
    )
