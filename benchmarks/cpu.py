"""The subject `cpu`: what the recurrence and the models cost on the machine's own cores."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from benchmarks import constancy, gradient, loop, peer
from benchmarks.results import Section


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of each section."""

    loop: loop.Sizes = field(default_factory=loop.Sizes)
    gradient: gradient.Sizes = field(default_factory=gradient.Sizes)
    peer: peer.Sizes = field(default_factory=peer.Sizes)
    constancy: constancy.Sizes = field(default_factory=constancy.Sizes)


FULL = Sizes()
QUICK = Sizes(
    loop=loop.Sizes(tokens=512, d_model=256, rounds=2),
    gradient=gradient.Sizes(tokens=512, d_model=256, rounds=2, memory_heads=16, memory_tokens=(512, 1024)),
    peer=peer.Sizes(
        tokens=512, decoded=8, rounds=2, d_model=256, layers=2, vocab_size=1000, presets=(), compile_limit_s=0,
        dtypes=(torch.float32,),
    ),
    constancy=constancy.Sizes(late=5000, chunk=512, steps=50, d_model=256, layers=2, vocab_size=1000),
)  # fmt: skip


def sections(sizes: Sizes) -> dict[str, Section]:
    """The sections by name, in the order they run: the one that reads the process's memory comes while that is small."""
    return {
        "late tokens against early ones": functools.partial(constancy.measure, sizes.constancy),
        "prefill against the token loop": functools.partial(loop.measure, sizes.loop),
        "cost of the gradient": functools.partial(gradient.cost, sizes.gradient),
        "memory of the gradient": functools.partial(gradient.memory, sizes.gradient),
        "against transformers' Mamba-2": functools.partial(peer.measure, sizes.peer),
    }


def tables(results: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal; refused sections are left out."""
    drawn = zip((_constancy, _loop, _cost, _memory, _peer), results.values(), strict=True)
    return [draw(result) for draw, result in drawn if "refused" not in result]


def _range(spread: dict[str, Any], digits: int = 2, low: str = "min", high: str = "max") -> str:
    return f"{spread['median']:.{digits}f} ({spread[low]:.{digits}f}..{spread[high]:.{digits}f})"


def _goal(row: dict[str, Any], sign: str = "≥") -> str:
    return f"{sign} {row['goal']:g}: {'met' if row['met'] else 'missed'}"


def _loop(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "level", "rank", "dtype", "prefill s", "loop s", "loop / prefill", "goal", title="Prefill, token loop"
    )
    for row in rows:
        times = [f"{row[name]['median']:.3f}" for name in ("prefill_s", "loop_s")]
        table.add_row(row["level"], str(row["rank"]), row["dtype"], *times, _range(row["ratio"], 1), _goal(row))
    return table


def _cost(rows: list[dict[str, Any]]) -> Table:
    table = Table("rank", "forward s", "forward + backward s", "ratio", title="Cost of the gradient")
    for row in rows:
        times = [f"{row[name]['median']:.3f}" for name in ("forward_s", "forward_and_backward_s")]
        table.add_row(str(row["rank"]), *times, _range(row["ratio"]))
    return table


def _memory(rows: list[dict[str, Any]]) -> Table:
    title = f"Memory of the gradient at {rows[0]['heads']} heads, KiB a token"
    table = Table("rank", "tokens", "kept for backward", "peak of both passes", "(all states)", title=title)
    for row in rows:
        names = ("kept_bytes_per_token", "peak_bytes_per_token", "all_states_bytes_per_token")
        table.add_row(str(row["rank"]), f"{row['tokens']:,}", *(f"{row[name] / 1024:,.1f}" for name in names))
    return table


def _peer(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "dtype", "verb", "contestant", "tokens/s", "ratio to the peer's best", "goal", title="transformers' Mamba-2"
    )
    for row in rows:
        for verb in ("prefill", "decode"):
            for name, speed in row[verb]["tokens_per_s"].items():
                ratio = row[verb]["ratios_to_peer"].get(name)
                goal = _goal(row[verb]) if name == row[verb]["best"]["ours"] else ""
                table.add_row(row["dtype"], verb, name, f"{speed:,.1f}", _range(ratio) if ratio else "", goal)
    return table


def _constancy(result: dict[str, Any]) -> Table:
    columns = ("token", "decode ms", "state bytes", "held by it", "process MiB", "late / early (quartiles)", "goal")
    table = Table(*columns, title="Late and early tokens")
    ratio = _range(result["ratio"], 3, "quartile_1", "quartile_3")
    verdict = {"early": ("", ""), "late": (ratio, _goal(result, "within"))}
    for name in ("early", "late"):
        resident = result["resident_bytes"][name]
        table.add_row(
            f"{result[name]:,}",
            f"{1e3 * result[f'{name}_s']['median']:.3f}",
            f"{result['state_bytes'][name]:,}",
            f"{result['state_held_bytes'][name]:,}",
            "unknown" if resident is None else f"{resident / 2**20:,.1f}",
            *verdict[name],
        )
    return table
