"""python -m benchmarks {cpu, numerics, kernels, model, serving, serving-gpu}, or mamba3 bench: run, show, write results."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import cpu as cpu_subject
from benchmarks import environment, plots, results
from benchmarks import kernels as kernels_subject
from benchmarks import numerics as numerics_subject
from benchmarks import whole_model as model_subject

app = typer.Typer(no_args_is_help=True, add_completion=False)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

Quick = Annotated[
    bool, typer.Option("--quick", help="Small sizes, in a minute: does everything run? Not to be quoted.")
]
Threads = Annotated[int, typer.Option(help="Threads that PyTorch uses; 0: one for each processor.")]
Out = Annotated[Path, typer.Option(help="Folder for the JSON file and the plot.")]


@app.command()
def cpu(quick: Quick = False, threads: Threads = 0, out: Out = results.FOLDER) -> None:
    """Prefill against the token loop, the gradient's cost, transformers' Mamba-2, and token 100,000 against token 100."""
    _run("cpu", cpu_subject, plots.draw_cpu, quick, threads, out)


@app.command()
def numerics(quick: Quick = False, threads: Threads = 0, out: Out = results.FOLDER) -> None:
    """Errors against float64: over a million tokens, and by dtype for outputs, states and gradients."""
    _run("numerics", numerics_subject, plots.draw_numerics, quick, threads, out)


@app.command()
def kernels(
    out: Out = results.FOLDER,
    section: Annotated[
        list[str] | None, typer.Option(help=f"Which of {', '.join(kernels_subject.SECTIONS)}; all unless given.")
    ] = None,
    quick: Quick = False,
    chunked: Annotated[bool, typer.Option(help="Time the PyTorch path too.")] = True,
    rivals: Annotated[bool, typer.Option(help="Time other projects' kernels, where they can be imported.")] = True,
    limit: Annotated[float, typer.Option(help="Seconds that checks and compilation may take, together.")] = 150.0,
    ready: Annotated[
        float, typer.Option(help="Seconds a rival, compiled ahead, may take to be ready at a shape.")
    ] = 60.0,
) -> None:
    """The Triton kernels on this GPU, forward, backward and decode, beside every other project's that can be imported."""
    sections = tuple(section or kernels_subject.SECTIONS)
    if unknown := set(sections) - set(kernels_subject.SECTIONS):
        raise typer.BadParameter(f"there is no section {', '.join(sorted(unknown))}")
    try:
        kernels_subject.run(
            out, sections=sections, quick=quick, chunked=chunked, with_rivals=rivals, limit_s=limit, ready_s=ready
        )
    except ValueError as error:
        console.print(f"[red]error: {escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from error


@app.command()
def serving(
    quick: Quick = False,
    threads: Threads = 0,
    out: Out = results.FOLDER,
    streams: Annotated[int, typer.Option(help="Concurrent streams; 0: the subject's own number.")] = 0,
    seconds: Annotated[float, typer.Option(help="Length of the streams' section; 0: the subject's own.")] = 0,
    parked: Annotated[int, typer.Option(help="Sessions parked; 0: the subject's own number.")] = 0,
    section: Annotated[
        list[str] | None, typer.Option(help="Which section, by its name in the results; all unless given.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what today's file has of this commit, and measure the rest.")
    ] = False,
) -> None:
    """A server under many streams and under malformed requests; parked sessions; kill -9; 16 bits; rows; speculation.

    The file is written after each section; what Ctrl-C leaves out, --resume adds."""
    from benchmarks import serving as subject

    given = {"streams": streams, "seconds": seconds, "parked": parked}
    sizes = replace(subject.QUICK if quick else subject.FULL, **{name: value for name, value in given.items() if value})
    with ExitStack() as stack:
        sections = subject.sections(sizes, stack)
        if unknown := set(section or ()) - set(sections):
            raise typer.BadParameter(
                f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}"
            )
        chosen = {name: sections[name] for name in sections if name in (section or sections)}
        _run("serving", subject, subject.draw, quick, threads, out, chosen, resume)


@app.command()
def serving_gpu(
    quick: Quick = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the code out.")] = "cuda",
    out: Out = results.FOLDER,
) -> None:
    """The engine on this GPU, 1.5B of random weights: tokens/s and latencies by streams, memory, roofline, verification."""
    from benchmarks import serving_gpu as subject

    try:
        path = subject.run(out, quick=quick, device=device, say=kernels_subject.say)
    except ValueError as error:
        console.print(f"[red]error: {escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"Written: {path.name} and {path.with_suffix('.png').name}")


@app.command()
def model(
    out: Out = results.FOLDER,
    name: Annotated[list[str] | None, typer.Option(help="Presets; siso-1.5b and mimo-1.5b unless given.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 128,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Prompt lengths; 512 and 2048 unless given.")] = None,
    state: Annotated[list[str] | None, typer.Option(help="Dtypes of S; float32 and float16 unless given.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that prefill and decoding are measured.")] = 3,
) -> None:
    """A whole model on this GPU, random weights: seconds of prefill, and of prefill and as many decoded tokens."""
    try:
        path = model_subject.run(
            out, models=name or ("siso-1.5b", "mimo-1.5b"), batch=batch, tokens=tokens or (512, 2048),
            states=state or ("float32", "float16"), repeats=repeats, say=kernels_subject.say,
        )  # fmt: skip
    except ValueError as error:
        console.print(f"[red]error: {escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"Written: {path.name} and {path.with_suffix('.png').name}")


def _run(
    name: str,
    subject: ModuleType,
    draw: results.Draw,
    quick: bool,
    threads: int,
    out: Path,
    sections: dict | None = None,
    resume: bool = False,
) -> None:
    torch.set_num_threads(threads or os.cpu_count() or 1)
    where = environment.describe()
    busy = where["load"] is not None and where["load"] > 0.5
    if busy:
        console.print(f"[yellow]Other processes are running (load {where['load']}): times will be uneven.[/]")
    chosen = sections or subject.sections(subject.QUICK if quick else subject.FULL)
    try:
        earlier = results.read_earlier(results.path_of(name, where, quick, out), where) if resume else {}
    except ValueError as error:
        console.print(f"[red]error: {escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from error
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(chosen))

        def tell(text: str) -> None:
            bar.update(task, description=escape(text))

        def keep(measured: dict) -> None:
            results.write(name, where, quick, measured, None, out)

        try:
            measured = results.run_sections(chosen, tell, lambda: bar.advance(task), keep, earlier)
        except KeyboardInterrupt:
            bar.stop()
            console.print(f"Broken off in {bar.tasks[task].description}; what was measured before it is written.")
            raise typer.Exit(130) from None
    for table in subject.tables(measured):
        console.print(table)
    path = results.write(name, where, quick, measured, draw, out)
    console.print(f"Written: {path.name} and {path.with_suffix('.png').name}")
    refused = results.refusals(measured)
    for section, why in refused.items():
        console.print(f"[red]No times for {escape(section)}: {escape(why)}.[/]", soft_wrap=True)
    if refused:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
