"""Laws of `mamba3 task`: it trains, goes on, shows, and says what was wrong."""

import re
import shlex
from pathlib import Path

import pytest

from tests.cli.test_cli_commands import failure, run

SMALL = [
    "--d-model", "16", "--headdim", "16", "--d-state", "8", "--stages", "5,9", "--steps", "3", "--batch", "8",
    "--evaluate", "12-12", "--sequences", "64", "--device", "cpu",
]  # fmt: skip


def test_fit_then_show(capsys, tmp_path):
    code, out, _ = run(capsys, "task", "fit", "parity", "--out", tmp_path, "--rates", "1e-3,1e-2", *SMALL)
    assert code == 0 and "12-12" in out and "1.00e-02" in out
    code, out, _ = run(capsys, "task", "show", "parity", "--model", tmp_path, "--bits", "10110")
    assert code == 0 and "of 5 running parities right" in out and "turns by" in out
    assert re.findall(r"│ ([01])\s+│ (\d)\s+│ ([01])", out) == [*zip("10110", "11233", "11011", strict=True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "copy"], "a task is one of parity"),
        (["fit", "parity", "--model", "lstm"], "a model is one of mamba3"),
        (["fit", "parity", "--rates", "fast"], "--rates must be numbers"),
        (["fit", "parity", "--evaluate", "256"], "--evaluate must be ranges"),
        (["show", "parity", "--bits", "102"], "a text of 0 and 1"),
        (["show", "mqar"], "task show draws the state of parity models"),
    ],
)
def test_mistakes_are_one_red_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, "task", *arguments)


def test_the_readme_shows_the_shipped_model(capsys):
    """The README's command as printed: every running parity right, half a turn on a one and none on a zero."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (command,) = re.findall(r"^mamba3 (task show .*)$", readme, re.M)
    code, out, _ = run(capsys, *shlex.split(command, comments=True))
    assert code == 0 and "13 of 13 running parities right" in out
    on_zero, on_one = (int(v) for v in re.search(r"turns by ([+-]?\d+)° on a 0 and ([+-]\d+)° on a 1", out).groups())
    assert abs(on_zero) < 10 and abs(on_one) > 170 and not re.search("[+-]0°", out)
