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
DOCUMENT = SCRIPT.parents[1] / "docs" / "results" / "state-tracking.md"
FINISHING = json.loads((DOCUMENT.with_suffix("") / "2026-11-22-H200-finishing.json").read_text())
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


def test_the_finishing_plans_hold_three_seeds_of_the_winners_and_every_missing_row(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import torch
    from table5b import entrants
    from table5b_plans import finishing

    from mamba3.tasks.settings import Settings

    found = finishing(Settings())
    assert list(found)[:2] == ["arithmetic-brackets.mamba3.learned", "arithmetic.mamba3.learned"]
    for plan in list(found.values())[:2]:
        assert plan.enough and plan.keep[-1] == 3 and {m.seed for m in plan.members} == {0, 1, 2}
        assert plan.settings.stages[-1] == 160 and plan.stage_end(0) < plan.settings.total
    kinds = {(plan.task, member.kind) for plan in found.values() for member in plan.members}
    for task in ("arithmetic", "arithmetic-brackets"):
        assert {(task, kind) for kind in ("gdn", "mamba2", "transformer", "mamba3-rope", "mamba3-norotation")} <= kinds
        assert {(task, f"mamba3-{kind}") for kind in ("euler", "trapezoid", "nobias", "heavytail")} <= kinds
    assert ("parity", "gdn") in kinds
    for plan in found.values():
        if plan.members[0].kind != "gdn":  # all others can be built here: the models of a plan share a stack
            assert len(entrants(plan, True, torch.device("cpu")).weights) == len(plan.members)


def test_the_plans_that_have_results_are_still_those_plans(monkeypatch):
    """A folder of results is refused by another plan: what was trained would be trained again."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from table5b_plans import finishing

    from mamba3.tasks.settings import Settings

    found = finishing(Settings())
    assert len(FINISHING["sweeps"]) == 6
    for name, sweep in FINISHING["sweeps"].items():
        assert found[name].identity() == sweep["identity"]


def test_only_decay_differs_until_the_first_stage_of_nodecay_ends(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from dataclasses import replace

    from table5b_plans import finishing

    from mamba3.tasks.settings import Settings

    found = finishing(Settings())
    for row in FINISHING["rows"][:2]:
        before, after = found[row["plan"]], found[row["plan"].replace("learned", "nodecay")]
        assert [m for m in before.members if m.rate == pytest.approx(row["rate"])] == list(after.members)
        assert after.settings.weight_decay == 0.0 and after.enough > before.enough
        settings = replace(after.settings, weight_decay=before.settings.weight_decay)
        same = replace(after, settings=settings, members=before.members, keep=before.keep, enough=before.enough)
        assert same == before


def test_the_document_says_what_the_results_say():
    """Of the finishing plans and of what went on from them: seeds, medians and lengths."""
    text, rows = DOCUMENT.read_text(), FINISHING["rows"]
    by_plan = {(row["plan"], row["model"]): row for row in rows}
    names = {
        "parity, half turn": ("parity.seeds", "mamba3"),
        "parity, all turn": ("parity.allturn.seeds", "mamba3-allturn"),
        "arithmetic without brackets, heads of 16": ("arithmetic.mamba3.learned", "mamba3"),
        "arithmetic with brackets, heads of 16": ("arithmetic-brackets.mamba3.learned", "mamba3"),
    }
    for name, key in names.items():
        row = by_plan[key]
        figures = " | ".join(f"{v:.1f}" for v in (*row["seeds"], row["median"]))
        assert f"| {name} | {row['rate']:.1e} | {figures} |".replace("e-0", "e-") in text
    for name, task in (("without", "arithmetic"), ("with", "arithmetic-brackets")):
        row = by_plan[f"{task}.mamba3.learned, gone on", "mamba3"]
        figures = " | ".join(f"{row['best'][f'{n}-{n}']:.1f}" for n in (160, 256, 320, 640))
        assert f"| arithmetic {name} brackets | {figures} |" in text
    for kind, name in (("mamba3-rope", "standard RoPE"), ("mamba3-norotation", "no rotation")):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        for cell, task in zip(line.split("|")[3:5], ("arithmetic", "arithmetic-brackets"), strict=True):
            assert cell.split()[0] == f"{by_plan[f'{task}.without.short', kind]['best']['256-256']:.1f}"
    for task, longest in (("arithmetic", "without"), ("arithmetic-brackets", "with")):
        sweep = FINISHING["sweeps"][f"{task}.mamba3.learned"]
        settings = sweep["identity"]["plan"]["settings"]
        ends = [*sweep["stage_begins"][1:], settings["steps"] * len(settings["stages"])]
        steps = [end - begin for begin, end in zip(sweep["stage_begins"], ends, strict=True)]
        assert f"| {longest} brackets, steps | {' | '.join(f'{n:,}' for n in steps)} |" in text


def test_two_workers_fill_one_table_and_count_the_seeds_of_the_best_rate(tmp_path):
    pytest.importorskip("matplotlib")
    only = ["arithmetic.mamba3.learned", "parity.seeds"]
    command = [
        sys.executable,
        str(SCRIPT),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--quick",
        "--gpus",
        "2",
        "--side-by-side",
        "2",
        "--only",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([*command, *only], env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert "2 of 2 rows are finished" in done.stdout
    logs = [(tmp_path / f"worker-{i}.log").read_text() for i in range(2)]
    assert sum(f"{name}: step" in log for name in only for log in logs) == 2  # each once
    rows = json.loads((tmp_path / "table5b.json").read_text())["rows"]
    row = rows[0]
    assert len(row["seeds"]) == 3 and row["median"] == sorted(row["seeds"])[1]
    assert max(row["seeds"]) == row["best"]["12-12"]
    (tmp_path / only[0] / "results.json").unlink()
    (tmp_path / only[0] / "failed.txt").write_text("an earlier call's")
    assert "2 of 2" in subprocess.run(
        [*command, *only], env=environment, capture_output=True, text=True, timeout=200, check=True
    ).stdout  # fmt: skip


def test_a_plan_that_fails_leaves_the_one_beside_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import argparse

    import table5b

    wanted = {name: table5b.plans(table5b.QUICK, (1e-3,), 3)[name] for name in FEW}
    built = table5b.entrants

    def entrants(plan, *more, **named):
        if plan.task == "parity":
            raise RuntimeError("no kernel image is available")
        return built(plan, *more, **named)

    monkeypatch.setattr(table5b, "entrants", entrants)
    monkeypatch.setattr(table5b.signal, "signal", lambda *_: None)
    options = argparse.Namespace(
        out=tmp_path, device="cpu", until=None, worker=None, readers=0, side_by_side=2, seeds=1, quick=True, plain=False,
        padded=False, save_every=60.0,
    )  # fmt: skip
    table5b.work(options, wanted)
    assert "no kernel image" in (tmp_path / FEW[0] / "failed.txt").read_text()
    assert (tmp_path / FEW[1] / "results.json").is_file() and not (tmp_path / FEW[1] / "failed.txt").exists()


def test_the_check_of_kernels_ends_with_their_errors(tmp_path):
    """Without a GPU the kernels run in Triton's interpreter, on tiny models."""
    pytest.importorskip("triton")
    out, environment = (
        tmp_path / "pace.json",
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    script, words = (
        str(SCRIPT.with_name("table5b_pace.py")),
        ["--quick", "--device", "cpu", "--errors-alone", "--out", str(out)],
    )
    subprocess.run([sys.executable, script, *words], env=environment, check=True, timeout=200)
    found = json.loads(out.read_text())
    assert found["kernels"] and 0 < found["errors"]["highest"]["gradient"] < 1e-5


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
