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
FEW = ["--quick", "--models", "mamba3", "mamba3-norotation", "--tasks", "parity", "--d-model", "32", "--seeds", "2"]


def start(out: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", *FEW, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out + err


def test_runs_whole_and_skips_what_is_finished(tmp_path):
    pytest.importorskip("matplotlib")
    assert "2 cells" in finish(start(tmp_path))
    table = json.loads((tmp_path / "table5b.json").read_text())
    assert table["quick"] and [cell["model"] for cell in table["cells"]] == ["mamba3", "mamba3-norotation"]
    first = table["cells"][0]
    assert first["paper"] == 100.0 and len(first["sweep"]) == 2 and len(first["seeds"]["12-12"]) == 2
    assert first["best"]["12-12"] == max(run["scaled"]["12-12"] for run in first["sweep"])
    assert (tmp_path / "table5b.png").read_bytes().startswith(b"\x89PNG")
    again = finish(start(tmp_path))
    assert "step" not in again  # nothing was trained
    assert json.loads((tmp_path / "table5b.json").read_text()) == table


@pytest.mark.slow
def test_goes_on_after_a_kill(tmp_path):
    """Killed in the middle of a cell; what the second process ends with is what an uninterrupted one has."""
    pytest.importorskip("matplotlib")
    process = start(tmp_path / "cut", "--steps", "40")
    checkpoint = tmp_path / "cut" / "cells" / "parity.mamba3.d32" / "sweep" / "checkpoint.safetensors"
    deadline = time.time() + 60
    while not checkpoint.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert checkpoint.exists() and not (checkpoint.parent / "results.json").exists()
    finish(start(tmp_path / "cut", "--steps", "40"))
    finish(start(tmp_path / "whole", "--steps", "40"))
    tables = [json.loads((tmp_path / name / "table5b.json").read_text()) for name in ("cut", "whole")]
    for table in tables:
        for cell in table["cells"]:
            del cell["seconds"]
    assert tables[0] == tables[1]
