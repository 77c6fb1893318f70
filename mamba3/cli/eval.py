"""`mamba3 eval`: a model's scores on tasks of lm-evaluation-harness, as a table and as a file."""

import importlib.util
import json
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mamba3.cli.console import console, errors
from mamba3.cli.options import DeviceName, DtypeName, ModelName, TokenizerName

_PAPER = "lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande,openbookqa"


def evaluate(
    model: ModelName = "run",
    tasks: Annotated[
        str, typer.Option(help="tasks of the harness, and niah_single_1 to 3, separated by commas")
    ] = _PAPER,
    tokenizer: TokenizerName = None,
    out: Annotated[Path, typer.Option(help="where the results go, as JSON")] = Path("results.json"),
    limit: Annotated[int | None, typer.Option(help="documents of each task at most", min=1)] = None,
    source: Annotated[
        str, typer.Option(help="of documents: bundled, hub, or auto (bundled where there are any)")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="texts at a time", min=1)] = 16,
    beginning: Annotated[
        bool | None,
        typer.Option(help="put the token of a text's beginning before every text; as the tokenizer does if absent"),
    ] = None,
    lengths: Annotated[str, typer.Option(help="of the niah tasks, in tokens")] = "1024,2048,4096",
    haystack: Annotated[
        Path | None, typer.Option(help="prose to hide needles of niah_single_2 and 3 in; bundled stories if absent")
    ] = None,
    device: DeviceName = "auto",
    dtype: DtypeName = None,
    decay: Annotated[str, typer.Option(help="of official weights: auto, softplus or heavy_tail")] = "auto",
) -> None:
    """Score a model. Stopped, the same command goes on: answers are kept beside the results until all are there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("Evaluation needs lm-evaluation-harness, which is not installed: pip install 'mamba3[eval]'.")
    if not out.parent.is_dir():
        raise ValueError(f"--out must lie in a folder that exists, but {out.parent} is none; make it first.")
    if not all(part.strip().isdigit() for part in lengths.split(",")):
        raise ValueError(f"--lengths must be numbers of tokens separated by commas, but is {lengths!r}.")
    import datasets  # pyright: ignore[reportMissingImports]

    from mamba3.cli.models import load_model
    from mamba3.evaluate import run
    from mamba3.ops.state_file import replace_file

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    prose = None if haystack is None else haystack.read_text(encoding="utf-8")
    lm, encoder = load_model(model, tokenizer, device, dtype, decay)
    cache = out.with_name(f".{out.name}.answers")
    with _bars() as bars, redirect_stdout(sys.stderr):  # the harness prints, and results alone go to stdout
        results = run.evaluate(
            lm, encoder, [name.strip() for name in tasks.split(",") if name.strip()], source=source, limit=limit,
            batch_size=batch_size, beginning=beginning, lengths=[int(n) for n in lengths.split(",")], haystack=prose,
            cache=cache, progress=_Drawn(bars),
        )  # fmt: skip
    results["mamba3"] = {"model": model, "tokenizer": tokenizer, "limit": limit, "source": source, "device": device}
    replace_file(out, (json.dumps(results, indent=2) + "\n").encode())
    for file in cache.parent.glob(f"{cache.name}.*"):
        file.unlink()
    console.print(_table(results))
    console.print(f"[dim]Written to {out}.[/]", soft_wrap=True)


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=errors, disable=not errors.is_terminal,
    )  # fmt: skip


class _Drawn:
    """A bar for each kind of request."""

    def __init__(self, bars: Progress):
        self.bars, self.tasks = bars, dict[str, Any]()

    def __call__(self, kind: str, done: int, total: int) -> None:
        if kind not in self.tasks:
            self.tasks[kind] = self.bars.add_task(kind, total=total)
        self.bars.update(self.tasks[kind], completed=done, total=total)


def _table(results: dict[str, Any]) -> Table:
    table = Table("task", "metric", "value", "± standard error", "documents", title="Scores", title_justify="left")
    for name, values in results["results"].items():
        count = str(results["n-samples"][name]["effective"])
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            deviation = values.get(f"{metric}_stderr,{filtered}")
            shown = f"{deviation:.4f}" if isinstance(deviation, int | float) and deviation < 1e6 else "-"
            table.add_row(name, metric, f"{value:.4f}" if value < 1e6 else f"{value:.3g}", shown, count)
    return table
