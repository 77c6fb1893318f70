"""The tables of docs/results/language-model.md, from the results files beside it: every figure there is one of these.

python runs/report.py --results docs/results/language-model
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "language-model"


def rows_of(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(value: dict[str, float | None], digits: int) -> str:
    """A mean, with the standard deviation over seeds where there is one."""
    sd = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{sd}"


def comparison(found: dict[str, Any]) -> str:
    """Perplexity of each kind over the context, and what a sequence leaves in memory; * marks a rate at the grid's edge."""
    table = sorted(found["table"], key=lambda row: row["val_loss"]["mean"])
    lengths = list(table[0]["test_perplexity"])
    header = [
        "kind",
        "seeds",
        "rate",
        "validation loss",
        *(f"{int(n):,}" for n in lengths),
        f"bytes at {int(lengths[-1]):,}",
    ]
    return rows_of(
        header,
        [
            [
                row["kind"],
                str(row["seeds"]),
                f"{row['rate']:g}{'*' if row['edge'] else ''}",
                spread(row["val_loss"], 4),
                *(spread(row["test_perplexity"][n], 2) for n in lengths),
                f"{row['memory_bytes'][lengths[-1]]:,}",
            ]
            for row in table
        ],
    )


def sweeps(found: dict[str, Any]) -> str:
    """Validation loss of the sweeps."""
    cells = [cell for cell in found["cells"].values() if not cell["final"]]
    rates = sorted({cell["rate"] for cell in cells})
    losses = {(cell["kind"], cell["rate"]): cell.get("val_loss") for cell in cells}
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))

    def told(kind: str, rate: float) -> str:
        loss = losses.get((kind, rate))
        return "diverged" if (kind, rate) in losses and loss is None else "" if loss is None else f"{loss:.4f}"

    return rows_of(
        ["kind", *(f"{rate:g}" for rate in rates)], [[kind, *(told(kind, rate) for rate in rates)] for kind in kinds]
    )


def throughput(found: dict[str, Any]) -> str:
    """What a step costs."""
    header = ["kind", "scan", "tokens a step", "compiled", "tokens/s", "ms", "of it launching", "memory, GB"]
    rows = []
    for row in found["rows"]:
        if "failed" in row:
            continue
        rows.append([
            row["kind"], row["impl"] if "mamba3" in row["kind"] or "ship" in row["kind"] else "", f"{row['micro_tokens']:,}",
            "no" if row["eager"] else "yes", f"{row['tokens_per_second']:,.0f}", f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['host_seconds']:.1f}", f"{row['peak_memory_bytes'] / 1e9:.1f}",
        ])  # fmt: skip
    return rows_of(header, rows)


def scaling(found: dict[str, Any]) -> str:
    """Several GPUs against one."""
    header = [
        "way",
        "GPUs",
        "tokens a step",
        "tokens/s",
        "share of linear",
        "memory a GPU, GB",
        "largest difference of a loss",
    ]
    rows = [
        [row["way"], str(row["ranks"]), f"{row['tokens']:,}", f"{row['tokens_per_second']:,.0f}",
         f"{row['share_of_linear']:.0%}", f"{row['memory_bytes'] / 1e9:.1f}", f"{row['loss_difference']:.1e}"]
        for row in found["rows"]
    ]  # fmt: skip
    return rows_of(header, rows)


TABLES = {"compare": (comparison, sweeps), "throughput": (throughput,), "scaling": (scaling,)}


def tables(results: Path) -> dict[str, list[str]]:
    """For each results file of the folder, by its name's last word, its tables."""
    made = {}
    for file in sorted(results.glob("*.json")):
        makers = TABLES.get(file.stem.rpartition("-")[2], ())
        made[file.name] = [make(json.loads(file.read_text())) for make in makers]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    for name, made in tables(parser.parse_args().results).items():
        sys.stdout.write(f"{name}\n\n" + "\n".join(made) + "\n")


if __name__ == "__main__":
    main()
