"""The unattended table, as a smoke run: whole, then skipped, then gone on with after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "runs" / "table5b.py"
FEW = ("parity.rotation.d32", "arithmetic.mamba3.d32")


def start(out: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--quick", "--only", *FEW, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out + err


def test_runs_whole_and_skips_what_is_finished(tmp_path):
    pytest.importorskip("matplotlib")
    assert "4 of 4 rows are finished" in finish(start(tmp_path))
    table = json.loads((tmp_path / "table5b.json").read_text())
    assert table["quick"] and [row["model"] for row in table["rows"]] == [
        "mamba3", "mamba3-rope", "mamba3-norotation", "mamba3",
    ]  # fmt: skip
    first = table["rows"][0]
    assert first["paper"] == 100.0 and len(first["runs"]) == 2
    assert first["best"]["12-12"] == max(run["scaled"]["12-12"] for run in first["runs"])
    assert (tmp_path / "table5b.png").read_bytes().startswith(b"\x89PNG")
    figure = [sys.executable, str(SCRIPT.with_name("table5b_figure.py")), "table5b.json", "--out", "again.png"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    subprocess.run(figure, cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "table5b.png").read_bytes()
    again = finish(start(tmp_path))
    assert "step" not in again  # nothing was trained
    assert json.loads((tmp_path / "table5b.json").read_text()) == table
    seeded = finish(start(tmp_path, "--seeds", "3"))
    assert "parity.rotation.d32.seeds: step" in seeded and "parity.rotation.d32: step" not in seeded
    for before, row in zip(table["rows"], json.loads((tmp_path / "table5b.json").read_text())["rows"], strict=True):
        assert len(row["seeds"]) == 3 and row["seeds"][0] == before["best"]["12-12"]
        assert row["median"] == sorted(row["seeds"])[1]


def test_stops_by_itself_and_names_what_is_not_finished(tmp_path):
    pytest.importorskip("matplotlib")
    assert "0 of 4 rows are finished" in finish(start(tmp_path, "--minutes", "0"))
    rows = json.loads((tmp_path / "table5b.json").read_text())["rows"]
    assert len(rows) == 4 and not any("best" in row for row in rows)


@pytest.mark.slow
def test_goes_on_after_a_kill(tmp_path):
    """Killed in the middle of a plan; what the second process ends with is what an uninterrupted one has."""
    pytest.importorskip("matplotlib")
    longer = ("--steps", "400", "--save-every", "0.2")
    process = start(tmp_path / "cut", *longer)
    checkpoint = tmp_path / "cut" / FEW[0] / "checkpoint.safetensors"
    deadline = time.time() + 60
    while not checkpoint.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert checkpoint.exists() and not (checkpoint.parent / "results.json").exists()
    finish(start(tmp_path / "cut", *longer))
    finish(start(tmp_path / "whole", *longer))
    tables = [json.loads((tmp_path / name / "table5b.json").read_text()) for name in ("cut", "whole")]
    for table in tables:
        for row in table["rows"]:
            del row["seconds"]
    assert tables[0] == tables[1]
