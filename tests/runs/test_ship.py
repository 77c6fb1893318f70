"""The run that makes the model that ships, and the shards that its corpus travels in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba3 import Mamba3LM
from mamba3.cli.models import load_model
from mamba3.train.report import read_metrics
from mamba3.train.store import Tokens

RUNS = Path(__file__).parents[2] / "runs"


def call(script: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUNS.parent)}
    command = [sys.executable, str(RUNS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_both_shapes_are_one_size_and_fit_the_repository(monkeypatch):
    monkeypatch.syspath_prepend(str(RUNS))
    import ship

    with torch.device("meta"):
        siso, mimo = (Mamba3LM(ship.shape(8192, rank, False)).num_parameters() for rank in (1, 4))
    assert siso > 15e6 and 2 * max(siso, mimo) < ship.MOST_BYTES and abs(mimo / siso - 1) < 0.02


@pytest.mark.slow
def test_a_run_in_parts_ships_what_it_measured(tmp_path):
    out = tmp_path / "ship"
    said = call("ship.py", "--out", str(out), "--quick", "--steps", "30", "--seconds", "0")
    assert "step 1 of 30" in said and "not all is done" in said
    assert "unfinished: step 1 of 30" in (out / "model" / "README.md").read_text()
    said = call("ship.py", "--out", str(out), "--quick", "--steps", "30")
    assert "step 30 of 30" in said and "not all is done" not in said
    result = json.loads((out / "model" / "result.json").read_text())
    assert result["step"] == 30 and result["test"]["64"]["perplexity"] < 200  # 257 is knowing nothing
    again = call("ship.py", "--out", str(out), "--quick")  # a finished run delivers the same once more
    assert json.loads((out / "model" / "result.json").read_text())["test"] == result["test"], again
    card = (out / "model" / "README.md").read_text()
    assert f"{result['test']['64']['perplexity']:.2f}" in card and f"{result['parameters']:,} parameters" in card
    model, _ = load_model(out / "model", None, "cpu", None)
    assert {p.dtype for name, p in model.named_parameters() if "weight" in name} == {torch.bfloat16}


@pytest.mark.slow
def test_a_fall_by_the_clock_ends_and_is_taken_back_to_be_extended(tmp_path):
    out, ends = tmp_path / "ship", []
    for more in ([], ["--extend"]):
        said = call("ship.py", "--out", str(out), "--quick", "--plan-seconds", "8", *more)
        plan = json.loads((out / "plan.json").read_text())
        steps = [line for line in read_metrics(out / "run" / "metrics.jsonl") if line["kind"] == "step"]
        assert "not all is done" not in said and steps[-1]["step"] == plan["steps"]
        assert [line["lr"] for line in steps[2 : plan["start"]]] == [2e-3] * (plan["start"] - 2)
        assert steps[-1]["lr"] == pytest.approx(2e-3 * 0.02)
        ends.append((plan["start"], plan["steps"]))
    assert ends[1][0] > ends[0][0]
    result = json.loads((out / "model" / "result.json").read_text())
    assert (result["step"], result["fall"]) == (ends[1][1], ends[1][1] - ends[1][0])


def test_shards_are_chosen_with_their_documents(monkeypatch):
    monkeypatch.syspath_prepend(str(RUNS))
    import books

    shards = [np.arange(10), np.arange(10, 16), np.arange(16, 30)]
    tokens = Tokens(shards, np.array([0, 4, 10, 16, 21, 30]))
    some = books.some_shards(tokens, 1, 3)
    assert some.offsets.tolist() == [0, 6, 11, 20] and some.read(6, 5).tolist() == [16, 17, 18, 19, 20]
    assert books.some_shards(tokens, 0, 9).offsets.tolist() == tokens.offsets.tolist()
    with pytest.raises(SystemExit, match="none of the 3"):
        books.some_shards(tokens, 3, 4)


def test_shards_travel_in_several_journeys(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RUNS))
    import books

    rng = np.random.default_rng(0)
    folder = tmp_path / "books"
    folder.mkdir()
    for name, count in (("train_00", 6), ("train_01", 5), ("val", 2), ("test", 2)):
        lines = ["".join(chr(97 + c) for c in rng.integers(0, 20, 300)) for _ in range(count)]
        (folder / f"books_{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    books.build(folder, tmp_path / "tokens", 300, 700)
    books.pack(tmp_path / "tokens", tmp_path / "packed")
    whole = books.read(tmp_path / "tokens", "train")
    assert len(whole.shards) > 3
    files = sorted((tmp_path / "packed").iterdir())
    limit = sum(file.stat().st_size for file in files if not file.name.startswith("train.train-"))
    trips = books.journeys(tmp_path / "packed", limit)
    assert len(trips) > 1 and all(sum(file.stat().st_size for file in trip) <= limit for trip in trips)
    assert sorted(file for trip in trips for file in trip) == files
    trips = [trips[0], *([file] for trip in trips[1:] for file in trip)]
    sent, before = tmp_path / "sent", None
    for number, trip in enumerate(trips):  # each brings its own files alone
        shutil.rmtree(sent, ignore_errors=True)
        sent.mkdir()
        for file in trip:
            shutil.copy(file, sent)
        books.unpack(sent, tmp_path / "trips")
        if number == 0:
            assert not list(sent.glob("train.train-*.xz"))
            with pytest.raises(SystemExit, match="of train no shard has come"):
                books.read(tmp_path / "trips", "train")
            continue
        if before is not None:  # what a process has open stays what it was
            assert all(a.tolist() == b.tolist() for a, b in zip(before.shards, whole.shards, strict=False))
        before = books.read(tmp_path / "trips", "train")
    assert before is not None and len(before.shards) == len(whole.shards)
    with pytest.raises(SystemExit, match="belongs to the first journey"):
        books.unpack(sent, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a journey must hold"):
        books.journeys(tmp_path / "packed", 100)
    last = sorted((tmp_path / "packed").glob("train.train-*.xz"))[-1]
    waiting = last.rename(tmp_path / last.name)
    books.unpack(tmp_path / "packed", tmp_path / "there")
    part = books.read(tmp_path / "there", "train")
    assert (
        0 < part.documents < whole.documents and part.offsets.tolist() == whole.offsets[: part.documents + 1].tolist()
    )
    cut = tmp_path / "there" / "train" / "train-00001.bin"
    cut.write_bytes(cut.read_bytes()[:-100])  # as a call that was killed left it
    books.unpack(tmp_path / "packed", tmp_path / "there")
    for file in (tmp_path / "packed").glob("*.xz"):
        file.unlink()
    waiting.rename(last)
    books.unpack(tmp_path / "packed", tmp_path / "there")
    found = books.read(tmp_path / "there", "train")
    assert all(a.tolist() == b.tolist() for a, b in zip(found.shards, whole.shards, strict=True))
    assert (
        books.read(tmp_path / "there", "test").offsets.tolist()
        == books.read(tmp_path / "tokens", "test").offsets.tolist()
    )
