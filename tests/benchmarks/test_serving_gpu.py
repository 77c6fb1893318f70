"""What the GPU's serving benchmark does without a GPU: every section at toy size, and the arithmetic of its floors."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import serving_gpu
from benchmarks.__main__ import app
from mamba3.lm import Mamba3LM


def test_every_section_runs(tmp_path):
    done = CliRunner().invoke(app, ["serving-gpu", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*-serving-gpu-quick.json")
    found = json.loads(path.read_text())["results"]
    rows = found["streams, float32 state"]["rows"]
    assert [row["streams"] for row in rows] == [1, 3] and all(row["tokens_per_s"] > 0 for row in rows)
    assert all(check["error"] <= 1e-6 for check in found["checks"]) and len(found["verification"]) == 1
    assert path.with_suffix(".png").stat().st_size > 1000


def test_the_floor_and_the_memory_are_those_of_the_paper_s_model():
    """1.5B: 3.0 GB of weights in 16 bits, 51 MB of state; as much as a Transformer keeps of 260 tokens, or of 1,041."""
    with torch.device("meta"):
        model = Mamba3LM(serving_gpu.FULL.config, dtype=torch.bfloat16)
        found = serving_gpu.memory(model)
    assert serving_gpu.weight_bytes(model) == pytest.approx(2.99e9, rel=0.01)
    assert found["state_bytes"] == pytest.approx(24 * (64 * 64 * 128 * 4 + 64 * 32 * 4 + 64 * 192 * 2))
    every = found["as many key heads as query heads"]
    assert every["bytes_a_token"] == 2 * 24 * 2048 * 2 and every["equal_at_tokens"] == pytest.approx(260, abs=1)
    assert serving_gpu.floor_seconds(model, 128, found["state_bytes"], 3e12) == pytest.approx(5.36e-3, rel=0.01)
