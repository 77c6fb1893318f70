"""The page of the language models' results holds what its results files hold."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "language-model.md"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    import report

    return report


def test_every_table_of_the_page_is_that_of_its_file(report):
    page, made = PAGE.read_text(), report.tables(report.RESULTS)
    assert any(made.values())
    for name, found in made.items():
        for table in found:
            assert table in page, f"{name}: run python runs/report.py and bring the page up to date"


def test_a_table_tells_the_noise_and_the_edge(report):
    row = {"kind": "a", "seeds": 2, "rate": 1e-3, "edge": True, "memory_bytes": {"64": 1000}}
    row |= {"val_loss": {"mean": 3.0, "sd": 0.01}, "test_perplexity": {"64": {"mean": 20.0, "sd": None}}}
    table = report.comparison({"table": [row]})
    assert table.splitlines()[2] == "| a | 2 | 0.001* | 3.0000 ± 0.0100 | 20.00 | 1,000 |"
    cells = {
        "x": {"kind": "a", "rate": 1e-3, "final": False, "failed": "nan"},
        "y": {"kind": "a", "rate": 2e-3, "final": False},
    }
    cells["y"]["val_loss"] = 3.5
    assert report.sweeps({"cells": json.loads(json.dumps(cells))}).splitlines()[2] == "| a | diverged | 3.5000 |"
