"""The unattended recall runs, as a smoke run: stopped at once, whole, then skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "runs" / "mqar.py"


def run(out: Path, *more: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--device", "cpu", "--quick", *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stops_goes_on_and_skips_what_is_finished(tmp_path):
    assert "stopped in" in run(tmp_path, "--minutes", "0")
    assert "5 cells" in run(tmp_path)
    rows = json.loads((tmp_path / "mqar.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["mamba3", "mamba3-conv", "hybrid", "hybrid-conv", "attention"]
    assert all(0 <= row["accuracy"] <= 100 and len(row["runs"]) == 2 for row in rows)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/checkpoint.safetensors")}
    assert len(times) == 5 and "5 cells" in run(tmp_path)
    assert times == {p: p.stat().st_mtime_ns for p in times}
