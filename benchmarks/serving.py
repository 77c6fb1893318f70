"""The subject `serving`: what a server bears, what sessions cost, what the engine reaches with more and more rows."""

from __future__ import annotations

import functools
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import serving_engine, serving_load, serving_sessions, serving_speculation
from benchmarks.results import Section
from mamba3 import Mamba3Config, Mamba3LM
from mamba3.train.tokenizer import byte_tokenizer


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """layers x d_model of a model of bytes with random weights, and how long and how many of everything."""

    layers: int = 4
    d_model: int = 256
    streams: int = 64
    seconds: float = 600.0
    parked: int = 10_000
    restored: int = 10_000
    kills: int = 50
    requests: int = 1_000  # malformed ones
    rows: tuple[int, ...] = (1, 4, 16, 64)
    tokens: int = 64  # chosen by each row
    drift_tokens: int = 256
    books: bool = True  # whether speculation is measured with the model that ships, too
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


FULL = Sizes()
QUICK = Sizes(
    layers=2, d_model=64, streams=8, seconds=6, parked=100, restored=50, kills=3, requests=50, rows=(1, 4), tokens=16,
    drift_tokens=32, books=False,
)  # fmt: skip


def small_model(sizes: Sizes) -> Mamba3LM:
    """Random weights: what is measured does not depend on them, but for how often guesses are right."""
    torch.manual_seed(0)
    config = Mamba3Config(
        vocab_size=257, d_model=sizes.d_model, layers=("mamba3",) * sizes.layers, d_intermediate=2 * sizes.d_model,
        tie_embeddings=False,
    )  # fmt: skip
    return Mamba3LM(config, device=sizes.device, dtype=sizes.dtype).eval()


def save(sizes: Sizes, folder: Path) -> Path:
    """A folder that `mamba3 serve` reads."""
    small_model(sizes).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def sections(sizes: Sizes, stack: ExitStack) -> dict[str, Section]:
    """The sections by name, in the order they run; `stack` ends what they leave behind."""
    folder = save(sizes, Path(stack.enter_context(tempfile.TemporaryDirectory())) / "small")
    model = Mamba3LM.from_pretrained(folder, device=sizes.device).eval()
    return {
        "streams": functools.partial(serving_load.streams, folder, sizes.streams, sizes.seconds, sizes.device),
        "malformed requests": functools.partial(serving_load.malformed, folder, sizes.requests),
        "parked sessions": functools.partial(serving_sessions.parked, model, sizes.parked, sizes.restored),
        "kill -9 while parking": functools.partial(serving_sessions.kills, folder, sizes.kills),
        "16-bit parking": functools.partial(serving_sessions.drift, model, sizes.drift_tokens),
        "rows": functools.partial(serving_engine.rows, model, sizes.rows, sizes.tokens),
        "speculation": functools.partial(serving_speculation.speculation, model, sizes.tokens, sizes.books),
    }


def tables(results: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal; refused sections are left out."""
    found = []
    for name, result in results.items():
        if "refused" in result:
            continue
        table = Table("", "", title=name, title_justify="left")
        for key, value in _flat(result):
            if isinstance(value, list):  # for the plot
                continue
            table.add_row(key, f"{value:,.6g}" if isinstance(value, float) else str(value))
        found.append(table)
    return found


def _flat(result: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(result, dict):
        return [pair for key, value in result.items() for pair in _flat(value, f"{prefix} {key}".strip())]
    return [(prefix, result)]


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens a second by rows, latencies of the streams, the server's memory under them; what was not measured is empty."""
    figure = Figure(figsize=(13, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    measured = {name: result for name, result in results.items() if "refused" not in result}
    if "rows" in measured:
        speeds = measured["rows"]["tokens_per_s"]
        left.plot([int(n) for n in speeds], list(speeds.values()), marker="o")
        left.set(xscale="log", xlabel="rows", ylabel="tokens/s", title="the engine")
    if "streams" in measured:
        streams = measured["streams"]
        names = [(what, at) for what in ("first_token_s", "between_tokens_s") for at in ("p50", "p99")]
        middle.barh([f"{what[:-2].replace('_', ' ')}, {at}" for what, at in names], [streams[w][a] for w, a in names])
        middle.set(xlabel="seconds", title=f"{streams['streams']} streams")
        seconds, held = zip(*streams["resident_mib"]["trace"], strict=True)
        right.plot(seconds, held)
        right.set(xlabel="seconds", ylabel="MiB", title="memory of the server", ylim=(0, None))
    figure.savefig(path, dpi=120)
