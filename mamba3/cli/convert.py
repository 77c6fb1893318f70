"""`mamba3 convert`: a model folder, or a repository of the hub, into a folder of another layout."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mamba3.cli.console import console


def convert(
    source: Annotated[str, typer.Argument(help="folder or hub repository (owner/name), in any of the three layouts")],
    target: Annotated[Path, typer.Argument(help="model folder to make")],
    to: Annotated[str, typer.Option(help="layout of the result: mamba3, transformers or official")] = "mamba3",
    decay: Annotated[
        str, typer.Option(help="activation of the decay the weights were trained with: auto, softplus or heavy_tail")
    ] = "auto",
    dtype: Annotated[str | None, typer.Option(help="dtype of the result; as in the source if absent")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="split larger weights into files of this size, such as 5GB")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="the model's tokenizer, if none lies beside the weights: tokenizer.json, its folder, or a hub id"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the model that the target holds")] = False,
    check: Annotated[bool, typer.Option(help="compare the logits of the result with those of the source")] = True,
) -> None:
    """Convert a model: official, this package's or transformers' layout into any of them, bit for bit."""
    from mamba3.cli.models import pick_dtype
    from mamba3.convert import convert_folder

    done = convert_folder(
        source, target, to, decay=decay, dtype=pick_dtype(dtype), max_shard_size=max_shard_size, tokenizer=tokenizer,
        overwrite=overwrite, check=check,
    )  # fmt: skip
    lines = [
        f"{done.parameters:,} parameters, {done.source} layout to {done.target}, written to {target}; {done.choice}."
    ]
    if done.difference is not None:
        lines.append(
            f"Largest difference of a logit between source and result: {done.difference:.3g} (largest logit "
            f"{done.scale:.3g}, 96 fixed tokens, computed in float32 or wider)."
        )
    if "tokenizer.json" in done.tokenizer:
        lines.append(f"Tokenizer: {', '.join(done.tokenizer)} carried along.")
    else:
        line = "No tokenizer.json came along: `mamba3 generate` will need --tokenizer FILE, its folder or a hub id."
        if done.source == "official":
            line += (
                " Published checkpoints: that of meta-llama/Llama-3.1-8B (gated: accept its terms, `hf auth login`)."
            )
        lines.append(line)
    for line in lines:
        console.print(escape(line), soft_wrap=True)
