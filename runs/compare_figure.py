"""The figure of runs/compare.py: perplexity over context, and over what a sequence leaves in memory."""

from pathlib import Path
from typing import Any


def draw(table: list[dict[str, Any]], image: Path, quick: bool) -> None:
    """Two panels, means over seeds with their standard deviations as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_context, by_memory = figure.subplots(1, 2)
    for row in table:
        lengths = [int(n) for n in row["test_perplexity"]]
        found = row["test_perplexity"].values()
        bars = [value["sd"] or 0.0 for value in found]
        line = by_context.errorbar(
            lengths, [value["mean"] for value in found], bars, marker="o", ms=3, lw=1, capsize=2, label=row["kind"]
        )
        longest = str(max(lengths))
        at = row["test_perplexity"][longest]
        by_memory.errorbar(
            [row["memory_bytes"][longest] / 1e6], [at["mean"]], [at["sd"] or 0.0], marker="o", capsize=2,
            color=line.lines[0].get_color(),
        )  # fmt: skip
        by_memory.annotate(row["kind"], (row["memory_bytes"][longest] / 1e6, at["mean"]), fontsize=7)
    by_context.set(xscale="log", xlabel="context, tokens", ylabel="perplexity of held-out books")
    by_context.set_xticks(lengths, [f"{n:,}" for n in lengths])
    by_context.minorticks_off()
    by_memory.set(xscale="log", xlabel=f"state or cache after {int(longest):,} tokens, MB", ylabel="perplexity there")
    by_context.legend(fontsize=8)
    for axes in (by_context, by_memory):
        axes.grid(alpha=0.3)
    if quick:
        figure.suptitle("smoke run: these figures mean nothing")
    figure.savefig(image, dpi=130)
