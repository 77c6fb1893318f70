"""`mamba3 convert`: a published checkpoint into a model folder of this package."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mamba3.cli.console import console

_TOKENIZER = "tokenizer.json"


def convert(
    source: Annotated[str, typer.Argument(help="folder or hub repository in the official layout")],
    target: Annotated[Path, typer.Argument(help="model folder to write")],
    decay: Annotated[
        str, typer.Option(help="activation of the decay the weights were trained with: auto, softplus or heavy_tail")
    ] = "auto",
    dtype: Annotated[str | None, typer.Option(help="dtype of the result; as published if absent")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="the model's tokenizer.json, if the folder has none")] = None,
) -> None:
    """Convert an official Mamba-3 checkpoint."""
    from mamba3.cli.models import pick_dtype
    from mamba3.convert import read_official

    model, choice = read_official(source, decay, pick_dtype(dtype), tokenizer=tokenizer)
    model.save_pretrained(target)
    console.print(f"{model.num_parameters():,} parameters written to {target}; {escape(str(choice))}.", soft_wrap=True)
    beside = tokenizer or Path(source) / _TOKENIZER
    if beside.is_file():
        shutil.copy(beside, target / _TOKENIZER)
    else:
        console.print(f"No {_TOKENIZER} came along: `mamba3 generate` will need --tokenizer FILE.", soft_wrap=True)
