"""Going on with a trained model on longer sequences, as a smoke run from the model that ships."""

import os
import subprocess
import sys
from pathlib import Path

from mamba3.lm import Mamba3LM
from mamba3.tasks.phase import shipped_parity

SCRIPT = Path(__file__).parents[2] / "runs" / "longer.py"


def test_starts_from_the_weights_it_is_given(tmp_path):
    """At a rate of nearly nothing the made model is the given one."""
    shipped_parity().save_pretrained(tmp_path / "model")
    command = [
        sys.executable, str(SCRIPT), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--device", "cpu",
        "--stages", "20", "40", "--steps", "5", "--batch", "8", "--rates", "1e-12", "--sequences", "16",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "40 tokens 100.00, 256 tokens 100.00" in done.stdout
    made = Mamba3LM.from_pretrained(tmp_path / "out" / "best-mamba3").state_dict()
    for name, value in shipped_parity().state_dict().items():
        assert (made[name] - value).abs().max() < 1e-6
