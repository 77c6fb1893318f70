"""docs/serving.md: its examples run as printed, its sizes are those of the configurations."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mamba3 import Mamba3LM, preset
from tests.test_readme import furnish

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # a script's clients end with the script
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run_as_printed(code, server, tmp_path, monkeypatch, capsys):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "serving.md", "exec"), {})


def test_the_table_of_sizes():
    found = re.findall(r"^\| (\w+-[\w.]+) \| ([\d.]+) GiB \| ([\d.]+) MiB \| ([\d,]+) \|$", DOCUMENT, re.M)
    assert len(found) == 5
    for name, weights, state, rows in found:
        with torch.device("meta"):
            model = Mamba3LM(preset(name), dtype=torch.bfloat16)
            held = sum(block.mixer.init_state(1, "meta", torch.bfloat16).nbytes for block in model.layers)
        size = sum(p.nbytes for p in model.parameters())
        assert (f"{size / 2**30:.2f}", f"{held / 2**20:.1f}") == (weights, state)
        assert f"{(72 * 2**30 - size) // held:,}" == rows


@pytest.mark.slow
def test_the_status_page_in_a_browser(server, tmp_path):
    """Headless Chromium shows what /status says."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium here")
    server.call("POST", "/v1/sessions", {"id": "seen"})
    server.client().completions.create(model="mamba3", prompt="x", max_tokens=3, extra_body={"session": "seen"})
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        f"--user-data-dir={tmp_path}",
    ]
    done = subprocess.run(
        [program, *options, "--dump-dom", server.url + "/"], capture_output=True, text=True, check=True
    )
    assert "<td>seen</td><td>1</td><td>4</td>" in done.stdout and ">0 of 4</dd>" in done.stdout
    assert '<small id="model">mamba3</small>' in done.stdout
