"""`mamba3 task fit` trains a small model on a task; `mamba3 task show` looks into one that reads bits."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from mamba3.cli.console import console
from mamba3.cli.options import DeviceName

task_app = typer.Typer(help="State tracking and recall: train a small model, look inside.", no_args_is_help=True)
_ARROWS = "→↗↑↖←↙↓↘"
_HALF = 12  # characters of the line from 0° to 180°
_PROBE = "0110100110010110100101100110100100101101"  # bits by which the turning pair is found


def _numbers(text: str, kind: type, name: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name} must be numbers with commas between them; it is {text!r}.") from error


@task_app.command()
def fit(
    task: Annotated[str, typer.Argument(help="parity, arithmetic, arithmetic-brackets or mqar")],
    out: Annotated[Path, typer.Option(help="the run's folder; the same command goes on from it")] = Path("task-run"),
    model: Annotated[str, typer.Option(help="mamba3, mamba3-mimo, mamba3-rope, ..., transformer")] = "mamba3",
    d_model: Annotated[int, typer.Option(help="width")] = 32,
    layers: Annotated[int | None, typer.Option(help="layers (default: parity 1, mqar 2, others 3)")] = None,
    d_state: Annotated[int, typer.Option(help="state channels of a head")] = 64,
    headdim: Annotated[int, typer.Option(help="channels of a head")] = 64,
    rates: Annotated[
        str, typer.Option(help="peak learning rates, trained side by side, or `paper` for its eight")
    ] = "1e-3",
    seeds: Annotated[str, typer.Option(help="seeds, side by side with every rate")] = "0",
    stages: Annotated[str, typer.Option(help="longest training sequence of each stage")] = "40,80,120,160",
    steps: Annotated[int, typer.Option(help="optimizer steps of each stage")] = 10_000,
    batch: Annotated[int, typer.Option(help="sequences of a step")] = 256,
    weight_decay: Annotated[float, typer.Option(help="AdamW's")] = 0.1,
    decay_bc_bias: Annotated[bool, typer.Option(help="decay B and C biases")] = False,
    evaluate: Annotated[
        str, typer.Option(help="ranges of lengths, best first: 256-256 is exactly 256 tokens")
    ] = "256-256,40-256,512-512,1024-1024,4096-4096",
    sequences: Annotated[int, typer.Option(help="fresh sequences in each range that ends by 256")] = 8192,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 500,
    device: DeviceName = "auto",
) -> None:
    """Train a model for every rate and seed at once, evaluate all of them, keep the best."""
    from mamba3.cli.interrupt import INTERRUPTED, stop_on_interrupt
    from mamba3.cli.models import pick_device
    from mamba3.tasks import make_task
    from mamba3.tasks.fit import fit as run
    from mamba3.tasks.models import model_config
    from mamba3.tasks.settings import PAPER_RATES, Settings

    chosen = make_task(task)
    config = model_config(
        task, chosen.vocab_size, model, d_model=d_model, layers=layers, d_state=d_state, headdim=headdim
    )
    settings = Settings(
        rates=PAPER_RATES if rates == "paper" else _numbers(rates, float, "--rates"),
        seeds=_numbers(seeds, int, "--seeds"), stages=_numbers(stages, int, "--stages"), steps=steps, batch=batch,
        weight_decay=weight_decay, decay_bc_bias=decay_bc_bias, ranges=_ranges(evaluate), sequences=sequences,
        save_every=save_every,
    )  # fmt: skip
    with stop_on_interrupt("Stopping after this step, with a checkpoint") as interrupted, _Bar() as bar:
        results = run(chosen, config, settings, out, device=pick_device(device), listen=bar, should_stop=interrupted)
    if results is None:
        console.print("Stopped; the same command goes on from there.")
        raise typer.Exit(INTERRUPTED)
    console.print(_scores(task, results))
    console.print(f"The best model is in {out / 'best'}.", soft_wrap=True)


def _ranges(text: str) -> tuple[tuple[int, int], ...]:
    pairs = []
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) != 2 or not all(end.isdigit() for end in ends):
            raise ValueError(f"--evaluate must be ranges such as 256-256,40-256; it is {text!r}.")
        pairs.append((int(ends[0]), int(ends[1])))
    return tuple(pairs)


class _Bar:
    """One bar for all models: the least and the largest of their losses."""

    def __init__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip

    def __enter__(self) -> "_Bar":
        self._progress.start()
        self._task = self._progress.add_task("", total=None, figures="")
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, step: int, steps: int, losses: list[float]) -> None:
        finite = [loss for loss in losses if math.isfinite(loss)] or [math.nan]
        figures = f"loss {min(finite):.3f}" + (f" to {max(finite):.3f}" if len(losses) > 1 else "")
        self._progress.update(self._task, completed=step, total=steps, figures=figures)


def _scores(task: str, results: dict) -> Table:
    ranges = list(results["runs"][0]["scaled"])
    table = Table("rate", "seed", "last loss", *ranges, title=f"{task}: scaled accuracy, %", title_justify="left")
    for i, run in enumerate(results["runs"]):
        scores = [f"{run['scaled'][name]:.2f}" for name in ranges]
        loss = "diverged" if run["diverged"] else f"{run['loss']:.4f}"
        table.add_row(
            f"{run['rate']:.2e}", str(run["seed"]), loss, *scores, style="bold" if i == results["best"] else None
        )
    return table


@task_app.command()
def show(
    task: Annotated[str, typer.Argument(help="parity is the task whose state is drawn")] = "parity",
    bits: Annotated[str, typer.Option(help="what the model reads")] = "1011000101101",
    model: Annotated[Path | None, typer.Option(help="folder of a trained model (default: the one shipped)")] = None,
) -> None:
    """Read bits one by one: the model's answer so far and the angle of the state that carries it."""
    import torch

    from mamba3.lm import Mamba3LM
    from mamba3.tasks import Parity
    from mamba3.tasks.phase import shipped_parity, trace, turning_pair

    if task != "parity":
        raise ValueError(f"task show draws the state of parity models; it was asked for {task!r}.")
    tokens = Parity().encode(bits)
    folder = model / "best" if model is not None and (model / "best").is_dir() else model
    network = shipped_parity() if folder is None else Mamba3LM.from_pretrained(folder).eval()
    if network.config.vocab_size != Parity.vocab_size:
        raise ValueError(f"a parity model has {Parity.vocab_size} tokens; {folder} has {network.config.vocab_size}.")
    probe = Parity().encode(_PROBE)
    pair = turning_pair(trace(network, probe), probe == 2)
    seen, ones = trace(network, tokens), tokens == 2
    columns = [Column(name, no_wrap=True) for name in ("read", "ones", "parity", "answer", "sure", "phase", "")]
    table = Table(*columns)
    for i, odd in enumerate((ones.long().cumsum(0) % 2).tolist()):
        chances = seen.probabilities[i, 1:]
        answer, phase = (
            int(chances.argmax()),
            0.0 if pair is None else float(seen.phases[pair.layer][i, pair.head, pair.pair]),
        )
        colour = "green" if answer == odd else "red"
        drawn = "" if pair is None else _dial(phase)
        table.add_row(
            bits[i], str(int(ones[: i + 1].sum())), str(odd), f"[{colour}]{answer}[/]",
            f"{float(chances.max() / chances.sum()):.3f}", _degrees(phase) if pair else "-", drawn,
        )  # fmt: skip
    console.print(table)
    right = int((seen.probabilities[:, 1:].argmax(-1) == torch.cumsum(ones, 0) % 2).sum())
    console.print(f"{right} of {len(bits)} running parities right, {network.num_parameters():,} parameters.")
    if pair is not None:
        console.print(
            f"Layer {pair.layer}, head {pair.head}, pair {pair.pair} turns by {_degrees(pair.on_zero)} on a 0 and "
            f"{_degrees(pair.on_one)} on a 1 (parity needs 0° and 180°; turn score {pair.score:.3f} of 1).",
            soft_wrap=True,
        )


def _degrees(phase: float) -> str:
    """Whole degrees with their sign; 0° has none, whichever side it was rounded from."""
    return f"{degrees:+d}°" if (degrees := round(math.degrees(phase))) else "0°"


def _dial(phase: float) -> str:
    """The phase as an arrow and as a place on a line from -180° to 180°."""
    arrow = _ARROWS[round(phase / (math.pi / 4)) % 8]
    place = round((phase + math.pi) / (2 * math.pi) * (2 * _HALF))
    line = "·" * _HALF + "│" + "·" * _HALF
    return f"{arrow} {line[:place]}●{line[place + 1 :]}"
