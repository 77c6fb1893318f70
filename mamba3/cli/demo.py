"""`mamba3 demo`: a page from the model that comes with the package, on a processor; then the same state in another process.

Downloads nothing and needs no GPU. Every number that it shows is measured while it runs.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mamba3.cli.console import console
from mamba3.cli.elsewhere import go_on_elsewhere

MODEL = "books"
PROMPT = "CHAPTER I\n\nIt was late in the autumn when"
PAGE, CONTINUATION = 400, 40  # tokens
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
READING = 250  # words a minute of silent reading, about (Brysbaert, Journal of Memory and Language 109, 2019)


def demo(
    prompt: Annotated[str, typer.Option(help="how the page begins")] = PROMPT,
    tokens: Annotated[int, typer.Option(help="length of the page", min=1)] = PAGE,
    seed: Annotated[int, typer.Option(help="of the draws: another one writes another page")] = 0,
) -> None:
    """Write a page with the model that comes with the package, and go on with it in another process."""
    began = time.perf_counter()
    import torch

    from mamba3.cli.models import load_model
    from mamba3.cli.session import Session
    from mamba3.lm.generate import Sampling
    from mamba3.text.encode import encode, end_of_text
    from mamba3.text.stream import TextStream

    torch.set_num_threads(1)  # one token at a time is too little work to share
    model, tokenizer = load_model(MODEL, None, "cpu", None)
    console.rule("1. A page from a model that comes with the package")
    seconds = time.perf_counter() - began
    console.print(f"{model.num_parameters():,} parameters, trained on old English novels; loaded in {seconds:.1f} s.\n")
    session, stream, sampling = Session.new(model), TextStream(tokenizer), Sampling(**SAMPLING)
    session.generator.manual_seed(seed)
    # Documents begin after an end-of-text token.
    session.add([end_of_text(tokenizer), *encode(tokenizer, [prompt])[0].tolist()])
    console.print(f"[bold]{escape(prompt)}[/]", end="", soft_wrap=True)
    written, began = [], time.perf_counter()
    for token in session.tokens(sampling, tokens):
        written.append(stream.push(token))
        console.print(written[-1], end="", markup=False, soft_wrap=True)
    seconds = time.perf_counter() - began
    words = len("".join(written).split())
    console.print(
        f"\n\n{tokens} tokens, {words} words in {seconds:.1f} s on one thread: {tokens / seconds:,.0f} tokens/s, "
        f"{60 * words / seconds:,.0f} words a minute; people read about {READING}."
    )
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "page.safetensors"
        session.context = stream.context
        session.save(state)
        console.rule("2. Stop, and go on in another process")
        console.print("All that the model remembers is one state, as large after a page as after a library.")
        rest = "".join(stream.push(token) for token in session.tokens(sampling, CONTINUATION)) + stream.finish()
        go_on_elsewhere(MODEL, rest, state, SAMPLING, CONTINUATION)
    console.rule("What next")
    console.print(
        f"  mamba3 generate --model {MODEL} --prompt 'The old house'     (your own beginning)\n"
        "  mamba3 demo --seed 1                                     (another page)\n"
        "  mamba3 demo-train                                        (train a model of your own here, in minutes)\n"
        "  mamba3 info                                              (devices, and what runs on them)",
        soft_wrap=True,
    )
