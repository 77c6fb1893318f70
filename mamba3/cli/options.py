"""Options that several commands have, told in the same words."""

from typing import Annotated

import typer

ModelName = Annotated[
    str,
    typer.Option(help="a model folder in any layout, a training run, `books` (comes along) or a hub id (owner/name)"),
]
TokenizerName = Annotated[
    str | None, typer.Option(help="tokenizer.json, its folder or a hub id, if none lies beside the model")
]
DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeName = Annotated[str | None, typer.Option(help="dtype of the weights; as saved if absent")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token every time")]
TopK = Annotated[int, typer.Option(help="keep the k likeliest tokens; 0 keeps all")]
TopP = Annotated[float, typer.Option(help="keep the likeliest tokens whose mass reaches p")]
MinP = Annotated[float, typer.Option(help="keep tokens at least this share as likely as the likeliest")]
