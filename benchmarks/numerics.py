"""The subject `numerics`: errors against float64, over a million tokens and by dtype."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from benchmarks import dtypes, million
from benchmarks.results import Section


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of each section."""

    million: million.Sizes = field(default_factory=million.Sizes)
    dtypes: dtypes.Sizes = field(default_factory=dtypes.Sizes)


SHOWN = (10**3, 10**4, 10**5, 10**6)  # positions in the table, beside the first and the last
FULL = Sizes()
QUICK = Sizes(
    million=million.Sizes(tokens=20_000, stepped=4000, checked=1024, long_piece=16_384),
    dtypes=dtypes.Sizes(tokens=128),
)


def sections(sizes: Sizes) -> dict[str, Section]:
    """The sections by name, in the order they run."""
    return {
        "a million tokens": functools.partial(million.measure, sizes.million),
        "errors by dtype": functools.partial(dtypes.measure, sizes.dtypes),
    }


def tables(results: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal; refused sections are left out."""
    million_results, dtype_results = results.values()
    drawn = [] if "refused" in million_results else [_million(model) for model in million_results]
    return drawn if "refused" in dtype_results else [*drawn, _dtypes(dtype_results)]


def _million(model: dict[str, Any]) -> Table:
    memory = "every head at the floor of A" if model["long_memory"] else "heads as initialised"
    title = f"Error against float64, rank {model['rank']}, {memory}"
    table = Table("route", "token", "turned, rad", "y", "phi, rad", "S", "S unturned", title=title)
    turned = dict(zip(model["positions"], model["angle_rad"], strict=True))
    for route, errors in model["routes"].items():
        marks = errors["positions"]
        for i, m in enumerate(marks):
            if i == 0 or m == marks[-1] or m in SHOWN:
                values = [f"{errors[key][i]:.1e}" for key in ("y", "phi_rad", "S", "S_unturned")]
                table.add_row("" if i else route, f"{m:,}", f"{turned[m]:,.0f}", *values)
    plain = model["plain_float32_angle_error_rad"][-1]
    table.add_row("plain float32 sum of angles", f"{model['tokens']:,}", "", "", f"{plain:.1e}", "", "")
    return table


def _dtypes(rows: list[dict[str, Any]]) -> Table:
    title = f"Relative error at {rows[0]['tokens']} tokens"
    table = Table(
        "rank", "dtype", "unit roundoff", "y", "phi, rad", "S", "worst gradient", "others at most", title=title
    )
    for row in rows:
        *others, (worst, error) = sorted(row["gradients"].items(), key=lambda item: item[1])
        values = [f"{row[key]:.1e}" for key in ("unit_roundoff", "y", "phi_rad", "S")]
        table.add_row(str(row["rank"]), row["dtype"], *values, f"{worst} {error:.1e}", f"{others[-1][1]:.1e}")
    return table
