"""`mamba3 serve`: the OpenAI-compatible server."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from mamba3.cli.options import DeviceName, DtypeName, ModelName, TokenizerName
from mamba3.cli.serving import need_serve_extra


def serve(
    model: ModelName = "run",
    tokenizer: TokenizerName = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="what clients call the model; the folder's name if absent")] = None,
    rows: Annotated[int, typer.Option(help="sequences continued at a time")] = 16,
    queue: Annotated[int, typer.Option(help="requests of a key that may wait; more are told to come back (429)")] = 256,
    prefill_chunk: Annotated[int, typer.Option(help="tokens of a prompt read at a time")] = 512,
    step_tokens: Annotated[
        int, typer.Option(help="tokens read in a step, which bounds the time between tokens")
    ] = 1024,
    quantum: Annotated[
        int | None, typer.Option(help="tokens after which a sequence makes way for one that waits")
    ] = None,
    max_length: Annotated[int, typer.Option(help="tokens of one sequence of a hybrid")] = 65_536,
    max_tokens: Annotated[int, typer.Option(help="tokens chosen for a request at most")] = 4096,
    attention_mib: Annotated[
        int, typer.Option(help="MiB of pages for a hybrid's caches, of all rows and snapshots together")
    ] = 1024,
    cache_mib: Annotated[int, typer.Option(help="MiB of the prefix cache; 0 for none")] = 256,
    speculate: Annotated[
        int, typer.Option(help="tokens guessed at a time, by --draft or by what came before; 0: none")
    ] = 0,
    draft: Annotated[str | None, typer.Option(help="a smaller model of the same tokenizer that guesses")] = None,
    graphs: Annotated[
        bool, typer.Option(help="steps as CUDA graphs on a GPU, captured before the server listens")
    ] = True,
    state_dtype: Annotated[
        str | None, typer.Option(help="dtype of matrix states in rows on a GPU: float16 or bfloat16 halve them")
    ] = None,
    exact: Annotated[bool, typer.Option(help="results do not depend on the batch by a single bit; slower")] = False,
    sessions: Annotated[
        Path | None, typer.Option(help="folder for sessions; without it they end with the server")
    ] = None,
    session_mib: Annotated[
        int, typer.Option(help="MiB of sessions in memory; more are parked, or their states given up")
    ] = 1024,
    session_dtype: Annotated[
        str | None, typer.Option(help="dtype of states in session files: bfloat16 halves them")
    ] = None,
    save_turns: Annotated[
        bool, typer.Option(help="write a session after each change, or only when it is parked")
    ] = True,
    chat_template: Annotated[
        str | None, typer.Option(help="a Jinja file, or `plain`; that of the model if absent")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="file of API keys, one a line; also MAMBA3_API_KEYS, by commas")
    ] = None,
    per_key: Annotated[int, typer.Option(help="requests of one key at a time")] = 64,
    drain_seconds: Annotated[int, typer.Option(help="after SIGTERM, what is under way may take so long")] = 30,
    device: DeviceName = "auto",
    dtype: DtypeName = None,
) -> None:
    """Serve a model to OpenAI's clients, with sessions; stop it with Ctrl-C or SIGTERM."""
    need_serve_extra()
    from mamba3.cli.in_use import in_use
    from mamba3.cli.models import load_model, pick_dtype
    from mamba3.cli.serving import find_template, make_ready
    from mamba3.engine import EngineConfig, ModelDraft, SessionStore
    from mamba3.serve import ServeConfig, Service
    from mamba3.serve.run import serve as run

    engine = EngineConfig(
        rows=rows, queue=queue, prefill_chunk=prefill_chunk, step_tokens=step_tokens, quantum=quantum,
        max_length=max_length, attention_bytes=attention_mib * 2**20, cache_bytes=cache_mib * 2**20, exact=exact,
        speculate=speculate, graphs=graphs, state_dtype=state_dtype,
    )  # fmt: skip
    keys = _read_keys(api_keys)
    lm, encoder = load_model(model, tokenizer, device, dtype)
    guesser = None if draft is None else ModelDraft(load_model(draft, tokenizer or model, device, dtype)[0])
    with nullcontext() if sessions is None else in_use(sessions):
        store = SessionStore(
            lm, sessions, budget=session_mib * 2**20, dtype=pick_dtype(session_dtype), owners=max(1, len(keys)),
            save_turns=save_turns,
        )  # fmt: skip
        config = ServeConfig(
            model_name=name or Path(model).name,
            api_keys=keys,
            max_tokens=max_tokens,
            per_key=per_key,
        )
        service = Service(lm, encoder, find_template(chat_template, model, encoder), config, engine, store, guesser)
        make_ready(service.engine)
        run(service, host, port, drain_seconds)


def _read_keys(file: Path | None) -> tuple[str, ...]:
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    keys = [key.strip() for key in [*lines, *os.environ.get("MAMBA3_API_KEYS", "").split(",")]]
    found = tuple(key for key in keys if key and not key.startswith("#"))
    if file is not None and not found:
        raise ValueError(f"--api-keys must name a file with a key on each line, but {file} holds none.")
    return found
