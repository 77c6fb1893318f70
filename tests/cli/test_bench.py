"""`mamba3 bench` runs a checkout's benchmarks, or says what is missing."""

import pytest
import torch
from typer.testing import CliRunner

import mamba3
from mamba3.cli.app import app


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_help_is_that_of_the_benchmarks():
    done = invoke("--help")
    assert done.exit_code == 0
    assert all(subject in done.output for subject in ("cpu", "numerics", "kernels"))


def test_an_installed_package_says_where_the_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mamba3, "__file__", str(tmp_path / "site-packages" / "mamba3" / "__init__.py"))
    done = invoke("kernels")
    assert done.exit_code == 1
    assert "in the repository" in capsys.readouterr().err + done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_kernels_without_a_gpu_say_so(tmp_path):
    done = invoke("kernels", "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "needs a CUDA device" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())
