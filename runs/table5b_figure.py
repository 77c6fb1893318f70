"""Accuracy over length of Table 5b's models, from the results files of runs/table5b.py.

python runs/table5b_figure.py table5b/table5b.json --out lengths.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mamba3.tasks.models import KINDS
from mamba3.tasks.peers import PEERS

TASKS = ("parity", "arithmetic", "arithmetic-brackets")


def draw(rows: list[dict[str, Any]], image: Path, quick: bool = False) -> None:
    """One panel a task: scaled accuracy over length of the best model; circles are the paper's figures at 256 tokens."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    kinds = [*KINDS, *PEERS]
    finished = [row for row in rows if "best" in row]
    tasks = [task for task in TASKS if any(row["task"] == task for row in finished)]
    if not tasks:
        return
    figure = Figure(figsize=(4 * len(tasks) + 2, 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        lengths = {256}
        for row in finished:
            if row["task"] != task:
                continue
            exact = {int(k.split("-")[1]): v for k, v in row["best"].items() if len(set(k.split("-"))) == 1}
            exact = dict(sorted(exact.items()))
            style = "-" if row["d_model"] >= 64 else "--"
            colour = colormaps["tab20"](2 * kinds.index(row["model"]) % 21)
            label = row.get("label") or f"{row['model']} {row['d_model']}"
            axes.plot(list(exact), list(exact.values()), row.get("style", style), marker=".", color=colour, label=label)
            lengths |= exact.keys()
            if row["paper"] is not None:
                axes.plot([256], [row["paper"]], "o", mfc="none", color=colour, ms=9)
        axes.set(title=task, xlabel="tokens", ylabel="scaled accuracy, %", xscale="log")
        axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)], rotation=60)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    if quick:
        figure.suptitle("smoke run: these figures mean nothing")
    figure.savefig(image, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files with rows, as runs/table5b.py writes them")
    parser.add_argument("--out", type=Path, default=Path("lengths.png"))
    options = parser.parse_args()
    tables = [json.loads(place.read_text()) for place in options.results]
    draw([row for table in tables for row in table["rows"]], options.out, any(table.get("quick") for table in tables))


if __name__ == "__main__":
    main()
