"""The unattended recall runs, as a smoke run: stopped at once, whole, then skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mamba3.tasks.layered import RECALL

SCRIPT = Path(__file__).parents[2] / "runs" / "mqar.py"


def run(out: Path, *more: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--quick", *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stops_goes_on_and_skips_what_is_finished(tmp_path):
    assert "0 of 6 cells are finished" in run(tmp_path, "--minutes", "0")
    assert "6 of 6 cells are finished" in run(tmp_path)
    rows = json.loads((tmp_path / "mqar.json").read_text())["rows"]
    assert [row["model"] for row in rows] == list(RECALL)
    assert all(0 <= row["accuracy"] <= 100 and len(row["runs"]) == 2 and row["K"] == 4 for row in rows)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/results.json")}
    assert len(times) == 6 and "6 of 6 cells are finished" in run(tmp_path)
    assert times == {p: p.stat().st_mtime_ns for p in times}
