"""`mamba3 chat`: a conversation in the terminal, by the engine that serves."""

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mamba3.cli.console import errors
from mamba3.cli.options import DeviceName, DtypeName, MinP, ModelName, Temperature, TokenizerName, TopK, TopP
from mamba3.cli.serving import find_template, need_serve_extra

if TYPE_CHECKING:
    from mamba3.engine import Engine, Session, SessionStore, Speech
    from mamba3.serve import ChatTemplate

_HELP = "/rewind N goes back to the end of turn N, /quit or Ctrl-D ends; Ctrl-C breaks a reply off"
_FILE = "chat"  # what the session in --session FILE is called inside


def chat(
    model: ModelName = "run",
    tokenizer: TokenizerName = None,
    system: Annotated[str, typer.Option(help="what the model is told before the first turn")] = "",
    session: Annotated[
        Path | None, typer.Option(help="file that the conversation goes on from and is saved to")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="tokens of one reply at most")] = 512,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Annotated[int | None, typer.Option(help="of the draws")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="a Jinja file, or `plain`; that of the model if absent, else plain")
    ] = None,
    device: DeviceName = "auto",
    dtype: DtypeName = None,
) -> None:
    """Talk with a model. With --session FILE the conversation goes on the next time, without reading it again."""
    need_serve_extra()
    from mamba3.cli.models import load_model
    from mamba3.engine import Engine, EngineConfig, SamplingParams, SessionStore, Speech
    from mamba3.text.encode import end_of_text

    lm, encoder = load_model(model, tokenizer, device, dtype)
    template = find_template(chat_template, model, encoder) or find_template("plain", model, encoder)
    assert template is not None
    seed = secrets.randbits(62) if seed is None else seed
    settings = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, stop=template.stops
    )
    speech = Speech(encoder, end_of_text(encoder))
    engine = Engine(lm, EngineConfig(rows=1, cache_bytes=0), encoder, speech.end_token)
    store = SessionStore(lm)
    name = _open(store, session)
    errors.print(f"[dim]{_HELP}[/]")
    with store.use("", name) as talk:
        while (line := _read_line()) is not None:
            try:
                if line.startswith("/rewind"):
                    talk.rewind(_number(line))
                else:
                    _turn(engine, talk, template, speech, line, system, settings, seed + len(talk.turns))
            except ValueError as error:  # of this line; what was said before it stays
                errors.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
                continue
            if session is not None:
                _save(store, talk, session)


def _open(store: "SessionStore", file: Path | None) -> str:
    if file is None or not file.exists():
        return store.create(id=_FILE).id
    info = store.import_(file.read_bytes(), id=_FILE)
    errors.print(f"[dim]goes on after {info.turns} turns, {info.tokens} tokens[/]")
    return info.id


def _save(store: "SessionStore", talk: "Session", file: Path) -> None:
    from mamba3.ops.state_file import replace_file

    replace_file(file, store.dump(talk))


def _turn(
    engine: "Engine",
    talk: "Session",
    template: "ChatTemplate",
    speech: "Speech",
    line: str,
    system: str,
    settings,
    seed: int,
) -> None:
    """One question and its reply, shown as it comes."""
    from dataclasses import replace

    from mamba3.cli.interrupt import stop_on_interrupt

    messages = [{"role": "user", "content": line}]
    if talk.tokens:
        said, tokens = template.following(talk.text, messages)
    else:
        told = [{"role": "system", "content": system}] if system else []
        said, tokens = template.first([*told, *messages])
    request = talk.request("turn", tokens, replace(settings, seed=seed))
    engine.add(request)
    chosen, text, finish = [], "", None
    with stop_on_interrupt("Breaking the reply off") as should_stop:
        while finish is None:
            for output in engine.abort("turn") if should_stop() else engine.step():
                chosen += [] if output.token is None else [output.token]
                text += output.text
                finish = output.finish
                sys.stdout.write(output.text)
                sys.stdout.flush()
    sys.stdout.write("\n")
    talk.add_reply(request, said, chosen, text, finish, speech)


def _read_line() -> str | None:
    """The next line that says something; None at the end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line == "/quit":
            return None
        if line.startswith("/") and not line.startswith("/rewind"):
            errors.print(f"[dim]{_HELP}[/]")
        elif line:
            return line


def _number(line: str) -> int:
    word = line.removeprefix("/rewind").strip()
    if not word.isdigit():
        raise ValueError(f"/rewind needs the number of a turn, as in /rewind 2; it came with {word!r}.")
    return int(word)
