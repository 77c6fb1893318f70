"""Every section of `serving` runs at toy size, and none of its checks fails."""

import importlib.util
import json

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.checks import Refused
from benchmarks.serving_load import percentiles


@pytest.mark.slow
def test_the_serving_subject_runs(tmp_path):
    for name in ("fastapi", "openai", "schemathesis"):
        if not importlib.util.find_spec(name):
            pytest.skip(f"this benchmark needs {name}")
    settings = ["serving", "--quick", "--threads", "1", "--seconds", "4", "--streams", "4", "--parked", "20"]
    done = CliRunner().invoke(app, [*settings, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*-serving-quick.json")
    found = json.loads(path.read_text())["results"]
    assert found["streams"]["errors"] == 0 and found["streams"]["requests"] > 0
    assert found["malformed requests"]["failed_checks"] == 0 and found["kill -9 while parking"]["lost"] == 0
    assert found["speculation"]["the model itself"]["right_guesses"] == 1.0
    assert path.with_suffix(".png").stat().st_size > 1000


def test_percentiles():
    assert percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 51.0, "p99": 100.0, "most": 100.0}
    with pytest.raises(Refused, match="nothing was measured"):
        percentiles([])
