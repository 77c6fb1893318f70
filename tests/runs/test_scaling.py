"""The measurement of several ranks, as a smoke run on two CPU processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = Path(__file__).parents[2] / "runs"


@pytest.mark.slow
def test_every_way_is_checked_and_measured(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUNS.parent)}
    command = [sys.executable, str(RUNS / "scaling.py"), "--out", str(tmp_path), "--quick", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["way"], row["ranks"]) for row in rows] == [(w, n) for w in ("ddp", "fsdp", "context") for n in (1, 2)]
    assert all(row["loss_difference"] < 1e-5 and row["tokens"] == 128 * row["ranks"] for row in rows)
