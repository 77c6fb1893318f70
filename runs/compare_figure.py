"""The figure of runs/compare.py: perplexity over context, and over what a sequence leaves in memory; training loss."""

from pathlib import Path
from typing import Any


def draw(table: list[dict[str, Any]], finals: list[dict[str, Any]], image: Path, quick: bool) -> None:
    """Three panels: means over seeds with their standard deviations as bars; the training loss of each kind's first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    by_context, by_memory, by_tokens = figure.subplots(1, 3)
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
        first = next(
            (c for c in finals if c["kind"] == row["kind"] and c["rate"] == row["rate"] and "curve" in c), None
        )
        if first is not None:
            steps, losses = zip(*first["curve"], strict=True)
            read = [step * first["batch_tokens"] / 1e6 for step in steps]
            by_tokens.plot(read, losses, lw=1, color=line.lines[0].get_color())
    by_tokens.set(xlabel="tokens read, millions", ylabel="training loss, nats per token")
    by_context.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="perplexity of held-out books")
    by_context.set_xticks(lengths, [f"{n:,}" for n in lengths])
    by_context.minorticks_off()
    by_memory.set(
        xscale="log",
        yscale="log",
        xlabel=f"state or cache after {int(longest):,} tokens, MB",
        ylabel="perplexity there",
    )
    by_context.legend(fontsize=8)
    for axes in (by_context, by_memory, by_tokens):
        axes.grid(alpha=0.3)
    if quick:
        figure.suptitle("smoke run: these figures mean nothing")
    figure.savefig(image, dpi=130)
