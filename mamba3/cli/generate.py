"""`mamba3 generate`: text on stdout as it comes, from a prompt, a saved state, or both."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mamba3.cli.console import errors
from mamba3.cli.options import DeviceName, DtypeName, MinP, ModelName, Temperature, TokenizerName, TopK, TopP

_CONTEXT = 8  # tokens of the prompt's end that may decide how the next token is spelled


def generate(
    model: ModelName = "run",
    prompt: Annotated[str, typer.Option(help="text to continue; may be empty")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="read the prompt from this file")] = None,
    tokenizer: TokenizerName = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to choose at most")] = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1: tokens seen before become less likely")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="of the draws; a saved state goes on with its own")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")] = None,
    state_in: Annotated[Path | None, typer.Option(help="go on from this state")] = None,
    state_out: Annotated[Path | None, typer.Option(help="save the state here at the end")] = None,
    device: DeviceName = "auto",
    dtype: DtypeName = None,
    decay: Annotated[str, typer.Option(help="of official weights: auto, softplus or heavy_tail")] = "auto",
) -> None:
    """Continue a text. Going on from --state-in with no prompt gives the tokens of never having stopped."""
    from mamba3.cli.interrupt import INTERRUPTED, stop_on_interrupt
    from mamba3.cli.models import load_model
    from mamba3.cli.session import Session
    from mamba3.lm.generate import Sampling
    from mamba3.text.encode import encode, end_of_text
    from mamba3.text.stop import StopText
    from mamba3.text.stream import TextStream

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1 but is {max_new_tokens}.")
    if state_out is not None and not state_out.parent.is_dir():
        raise ValueError(
            f"--state-out must lie in a folder that exists, but {state_out.parent} is none; make it first."
        )
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    text = _prompt(prompt, prompt_file)
    lm, encoder = load_model(model, tokenizer, device, dtype, decay)
    session = Session.load(state_in, lm) if state_in else Session.new(lm)
    if seed is not None:
        session.generator.manual_seed(seed)
    ids = encode(encoder, [text])[0].tolist()
    session.add(ids)
    end = end_of_text(encoder)
    if not session.unread:
        session.add([end])  # documents begin after an end-of-text token
    decoder, output = TextStream(encoder, ids[-_CONTEXT:] or session.context), StopText(stop or [])
    began, count = time.perf_counter(), 0
    with stop_on_interrupt("Stopping after this token") as should_stop:
        for token in session.tokens(sampling, max_new_tokens):
            count += 1
            if token == end:
                break
            _write(output.push(decoder.push(token)))
            if output.found or should_stop():
                break
        stopped = should_stop()
    session.context = decoder.context
    if not output.found:  # a character that is incomplete is completed by whoever goes on
        _write(output.push("" if state_out else decoder.finish()) + output.finish())
    if sys.stdout.isatty():
        _write("\n")
    else:  # the text alone is written there; what stands behind it on the same terminal begins a line
        errors.print()
    seconds = time.perf_counter() - began
    errors.print(f"[dim]{count} tokens in {seconds:.2f} s, {count / seconds:,.1f} tokens/s[/]")
    if state_out is not None:
        session.save(state_out)
    if stopped:
        raise typer.Exit(INTERRUPTED)


def _prompt(prompt: str, file: Path | None) -> str:
    if file is None:
        return prompt
    if prompt:
        raise ValueError("--prompt and --prompt-file exclude each other, but both came; give one.")
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"--prompt-file must name a text file, but {file} {what}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file must be UTF-8 text, but {file} is not ({error}).") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
