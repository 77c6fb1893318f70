"""The README's examples run as printed; the one that downloads is left out."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "load_official" not in code]


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run_as_printed(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_what_the_readme_points_to_exists():
    for name in re.findall(r"\]\((docs/[\w./-]+|benchmarks/[\w./-]+)\)", README):
        assert (Path(__file__).parents[1] / name).exists(), name
