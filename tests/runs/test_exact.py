"""A parity model made exact: what its turning head does on the two tokens, and that nothing else does anything else."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mamba3.lm import Mamba3LM
from mamba3.tasks.models import model_config

SCRIPT = Path(__file__).parents[2] / "runs" / "exact.py"


@pytest.fixture(scope="module")
def exact():
    spec = importlib.util.spec_from_file_location("exact", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def untrained():
    """Of the two heads the second turns farther: its dt is larger."""
    model = Mamba3LM(model_config("parity", 3, "mamba3", d_model=16, d_state=8, headdim=16)).eval()
    with torch.no_grad():
        model.embedding.weight.normal_()
        model.layers[0].mixer.dt_bias.copy_(torch.tensor([-2.0, 1.0]))
    return model


def inputs(exact, model):
    mixer = model.layers[0].mixer
    with torch.no_grad():
        return mixer._inputs(mixer._project(exact.two_tokens(model).unsqueeze(0)))


def test_each_part_sets_what_it_names(exact):
    model = untrained()
    before = inputs(exact, model)
    assert exact.make_exact(model) == 1
    after = inputs(exact, model)
    turn = after.dt[0, 1, 1] * after.theta[0, 1]
    torch.testing.assert_close(turn.abs(), torch.full_like(turn, math.pi), rtol=1e-6, atol=0)
    assert turn.sign().equal(before.theta[0, 1].sign())
    assert after.dt[0, 0, 1] < 2e-6 and after.lam[0, 1, 1] > 1 - 1e-6
    floor = torch.full_like(after.A[0, :, 1], -model.config.A_floor)
    torch.testing.assert_close(after.A[0, :, 1], floor)
    for name in ("dt", "A", "lam"):  # the other head
        torch.testing.assert_close(getattr(after, name)[..., 0], getattr(before, name)[..., 0])
    for name in ("x", "B", "C"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name))
    torch.testing.assert_close(after.lam[0, 0], before.lam[0, 0])  # lambda of a zero
    assert not model.layers[0].mixer.B_bias[..., 4:].eq(0).any()
    exact.make_exact(model, ("rest",))
    rest = inputs(exact, model)
    assert rest.B[..., 4:].eq(0).all() and rest.B[..., :4].equal(after.B[..., :4]) and rest.B_bias[..., 4:].eq(0).all()
    alone = untrained_like(model, exact, ("decay",))
    assert alone.dt.equal(before.dt) and alone.theta.equal(before.theta) and not alone.A.equal(before.A)


def untrained_like(model, exact, parts):
    torch.manual_seed(0)
    other = untrained()
    exact.make_exact(other, parts)
    return inputs(exact, other)


def test_the_script_writes_a_model_that_scores(tmp_path):
    from mamba3.tasks.phase import shipped_parity

    shipped_parity().save_pretrained(tmp_path / "model")
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    command += ["--lengths", "64", "512", "--sequences", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=SCRIPT.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    assert "64 tokens: 100.0 of 16" in done.stdout and "512 tokens: 100.0" in done.stdout
    Mamba3LM.from_pretrained(tmp_path / "out")
