"""Every section of `serving` runs at toy size, and none of its checks fails."""

import dataclasses
import importlib.util
import json

import pytest
from typer.testing import CliRunner

from benchmarks import serving, serving_speculation
from benchmarks.__main__ import app
from benchmarks.checks import Refused
from benchmarks.serving_load import growth
from benchmarks.timer import percentiles


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
    assert found["malformed requests"]["malformed"] >= 50 and found["kill -9 while parking"]["lost"] == 0
    assert found["speculation"]["random weights"]["the model itself"]["right_guesses"] == 1.0
    assert path.with_suffix(".png").stat().st_size > 1000


def test_speculation_is_measured_by_kind_of_text(tmp_path, monkeypatch):
    """Both kinds, in both dtypes, a few tokens of each, with a small folder in the place of the model that ships."""
    folder = serving.save(serving.QUICK, tmp_path / "small")
    monkeypatch.setattr(serving_speculation, "_BOOKS", folder)
    monkeypatch.setattr(serving_speculation, "_ROUNDS", 1)
    found = serving_speculation.speculation(serving.small_model(serving.QUICK), 4, True, lambda text: None)
    assert len(found) == 5 and found["random weights"]["the model itself"]["right_guesses"] == 1.0
    for result in found.values():
        for name, values in result.items():
            assert values["tokens_per_s"] > 0 and (name == "none" or (0 <= values["same"] <= 1 and values["gain"] > 0))
    monkeypatch.setattr(serving_speculation.Engine, "step", wrong(serving_speculation.Engine.step))
    with pytest.raises(Refused, match="speculation changed the tokens"):
        serving_speculation.speculation(serving.small_model(serving.QUICK), 4, False, lambda text: None)


def wrong(step):
    """An engine that says something else where it guesses."""

    def changed(engine):
        shift = int(engine.config.speculate > 0)
        return [dataclasses.replace(output, token=(output.token + shift) % 257) for output in step(engine)]

    return changed


def test_percentiles():
    assert percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 51.0, "p99": 100.0, "most": 100.0}
    with pytest.raises(Refused, match="nothing was measured"):
        percentiles([])


def test_memory_is_a_line():
    """After the warm-up; what grew before it does not count."""
    flat = growth([(0.0, 0, 10.0), (60.0, 10, 50.0), (120.0, 1000, 50.0), (180.0, 2000, 50.0)], warm=60)
    assert (flat["settled"], flat["end"], flat["most"]) == (50.0, 50.0, 50.0)
    assert flat["slope"] == {"a_minute": 0.0, "a_thousand_requests": 0.0} and len(flat["trace"]) == 4
    steep = growth([(float(at), 10 * at, 100.0 + at / 60) for at in range(0, 600, 6)], warm=120)
    assert steep["slope"]["a_minute"] == pytest.approx(1.0)
    assert steep["slope"]["a_thousand_requests"] == pytest.approx(1000 / 600) and len(steep["trace"]) == 100


def interrupt(*arguments):
    raise KeyboardInterrupt


def measured(name):
    return lambda tell: {"value": name}


def test_a_run_that_breaks_off_is_written_and_goes_on(tmp_path, monkeypatch):
    """Ctrl-C in the second of three sections: the first is in the file; --resume measures the other two, and not that one."""
    calls = []

    def sections(broken):
        def first(tell):
            calls.append("first")
            return {"value": 1}

        return lambda sizes, stack: {
            "first": first, "second": interrupt if broken else measured("second"), "third": measured("third")
        }  # fmt: skip

    def run(*more):
        return CliRunner().invoke(app, ["serving", "--quick", "--threads", "1", "--out", str(tmp_path), *more])

    monkeypatch.setattr(serving, "sections", sections(broken=True))
    broken = run()
    assert broken.exit_code == 130 and "Broken off in second" in broken.output
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"] == {"first": {"value": 1}}
    monkeypatch.setattr(serving, "sections", sections(broken=False))
    done = run("--resume")
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())["results"]
    assert list(found) == ["first", "second", "third"] and calls == ["first"]
    assert run("--section", "third", "--resume").exit_code == 0 and calls == ["first"]
    assert list(json.loads(path.read_text())["results"]) == ["first", "second", "third"]
    assert run("--section", "third").exit_code == 0
    assert list(json.loads(path.read_text())["results"]) == ["third"]
    refused = run("--section", "fourth")
    assert refused.exit_code == 2 and "there is no section fourth" in refused.output
    other = json.loads(path.read_text())
    other["environment"]["commit"] = "another"
    path.write_text(json.dumps(other))
    assert run("--resume").exit_code == 1
