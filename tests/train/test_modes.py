"""Ways to train that must not change what is learnt: carried states, recomputation, compilation, saving in the background."""

import dataclasses
import json
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.ops import triton as kernels
from mamba3.train import TrainConfig, checkpoint, prepare
from mamba3.train.objective import Objective
from mamba3.train.packing import Batch
from mamba3.train.report import read_metrics
from mamba3.train.saver import Saver
from tests.train.test_trainer import COMMAND, CONFIG, corpus, losses, shape, train, weights

__all__ = ["corpus"]  # a fixture

CARRY = dataclasses.replace(CONFIG, layout="carry", seq_len=8, batch_tokens=32, micro_tokens=16)


def test_a_run_that_carries_states_is_resumed_with_them(corpus, tmp_path):
    train(corpus, tmp_path / "whole", CARRY)
    while train(corpus, tmp_path / "parts", CARRY, 5)[1].step < 12:
        pass
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    made = prepare(corpus, tmp_path / "parts", CARRY, shape)
    assert sorted(made.carried) == [0, 1] and made.carried[0].layers[0].S.abs().sum() > 0


def test_accumulated_passes_are_one_gradient(corpus, tmp_path):
    """Four passes of a quarter equal one pass of the same rows: the mean of means."""
    rows = dataclasses.replace(CONFIG, layout="rows", seq_len=8, batch_tokens=64)
    for micro in (64, 16):
        train(corpus, tmp_path / str(micro), dataclasses.replace(rows, micro_tokens=micro))
    for one, four in zip(losses(tmp_path / "64"), losses(tmp_path / "16"), strict=True):
        assert dict(one)["loss"] == pytest.approx(dict(four)["loss"], rel=1e-5)


@pytest.mark.parametrize("layout", ["packed", "carry"])
def test_recomputed_activations_change_nothing(corpus, tmp_path, layout):
    config = CARRY if layout == "carry" else CONFIG
    train(corpus, tmp_path / "kept", config)
    train(corpus, tmp_path / "again", dataclasses.replace(config, recompute=True))
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")
    assert weights(tmp_path / "again") == weights(tmp_path / "kept")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")  # of torch itself
def test_compiled_parts_change_nothing_but_rounding_and_resume_to_the_bit(corpus, tmp_path):
    config = dataclasses.replace(CONFIG, compile=True)
    train(corpus, tmp_path / "eager")
    train(corpus, tmp_path / "compiled", config)
    for a, b in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert dict(a)["loss"] == pytest.approx(dict(b)["loss"], rel=1e-4)
    train(corpus, tmp_path / "parts", config, 5)
    torch.compiler.reset()
    train(corpus, tmp_path / "parts", config)
    assert losses(tmp_path / "parts") == losses(tmp_path / "compiled")


def test_a_checkpoint_holds_what_was_there_when_it_was_begun(corpus, tmp_path, monkeypatch):
    """The model goes on changing while its checkpoint is written."""
    made, _ = train(corpus, tmp_path / "run", stop_after=2)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    finish = Saver._finish

    def slowly(self, *arguments):
        time.sleep(0.2)
        return finish(self, *arguments)

    monkeypatch.setattr(Saver, "_finish", slowly)
    made.step = 3
    made._save()
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.fill_(7.0)
        for state in made.optimizer.state.values():
            state["exp_avg"].fill_(7.0)
    assert len(checkpoint.list_checkpoints(tmp_path / "run")) == 1  # not there before it is whole
    made.saver.wait()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000003"]
    again = prepare(corpus, tmp_path / "run", CONFIG, shape)
    assert again.step == 3 and all(p.equal(before[name]) for name, p in again.model.named_parameters())
    assert not any((state["exp_avg"] == 7.0).any() for state in again.optimizer.state.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_has_the_figures(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(CONFIG, tensorboard=True)
    train(corpus, tmp_path / "run", config, 5)
    train(corpus, tmp_path / "run", config)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    metrics = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [(s.step, s.value) for s in read.Scalars("train/loss")] == [
        (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics
    ]
    assert {"train/lr", "train/gradient norm", "train/skips", "val/perplexity"} <= set(read.Tags()["scalars"])


def test_a_tokenizer_of_another_checkpoint_is_refused(corpus, tmp_path):
    from mamba3.train.tokenizer import train_bpe

    for name, texts in (("a", ["one two three"] * 3), ("b", ["four five six"] * 3)):
        train_bpe(texts, 262).save(str(tmp_path / f"{name}.json"))
    config = dataclasses.replace(CONFIG, tokenizer=str(tmp_path / "a.json"))
    train(corpus, tmp_path / "run", config, 2)
    other = dataclasses.replace(config, tokenizer=str(tmp_path / "b.json"))
    with pytest.raises(ValueError, match=r"the tokenizer it began with, but .*step-00000002 was made with another one"):
        prepare(corpus, tmp_path / "run", other, shape)


def test_models_whose_states_grow_are_refused_where_states_are_handed_on(corpus, tmp_path):
    def hybrid(vocabulary):
        return dataclasses.replace(shape(vocabulary), layers=("mamba3", "attention"), attn_heads=2)

    with pytest.raises(ValueError, match="layout = 'carry' needs layers whose state has a fixed size"):
        prepare(corpus, tmp_path / "run", CARRY, hybrid)
    shared = dataclasses.replace(CONFIG, context_parallel=2)
    for build, what in (
        (hybrid, "attention layers"),
        (lambda n: dataclasses.replace(shape(n), d_conv=4), "a short conv"),
    ):
        with pytest.raises(
            ValueError, match=f"context_parallel = 2 needs layers that a fixed state joins, but .* {what}"
        ):
            prepare(corpus, tmp_path / "run", shared, build)
    assert not (tmp_path / "run").exists()
    conv = prepare(corpus, tmp_path / "conv", CARRY, lambda n: dataclasses.replace(shape(n), d_conv=4))
    conv.run(lambda: conv.step >= 2)
    assert conv.carried[0].layers[0].conv is not None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments_change_nothing(corpus, tmp_path, seed):
    """A checkpoint after every step, so that many of the kills fall into the writing of one."""
    train(corpus, tmp_path / "whole", dataclasses.replace(CONFIG, save_every=1, steps=60))
    command = [sys.executable, "-m", "mamba3.cli", "train", str(corpus), "--out", str(tmp_path / "run"), *COMMAND]
    command += ["--save-every", "1", "--steps", "60"]
    moments, kills = random.Random(seed), 0
    while not (tmp_path / "run" / "model").exists():
        began = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and kills < 4 and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) <= began:
            time.sleep(0.01)
        if kills < 4:
            time.sleep(moments.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 4
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_the_command_shows_its_recipes_and_what_it_would_run(tmp_path):
    from typer.testing import CliRunner

    from mamba3.cli.app import app

    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in ("laptop", "small", "paper-180m", "paper-1.5b"))
    (tmp_path / "c.json").write_text(json.dumps({"recipe": "small", "steps": 9000, "model": {"layers": 3}}))
    said = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "c.json"), "--lr", "1e-3", "--show-config"])
    values = json.loads(said.output)
    assert (values["steps"], values["lr"], values["schedule"], values["model"]["layers"]) == (9000, 1e-3, "wsd", 3)
    assert TrainConfig.from_dict({k: v for k, v in values.items() if k != "model"}).dtype == "bfloat16"


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4])
def test_a_models_gradients_by_the_kernels_are_as_near_as_the_chunked_ones(rank, monkeypatch):
    """Under autocast, against float32: each parameter's error at most twice the chunked path's, or twice their middle."""
    torch.use_deterministic_algorithms(False)
    shape = Mamba3Config(
        vocab_size=512, d_model=256, layers=("mamba3",) * 4, d_state=64, headdim=64, d_intermediate=256, mimo_rank=rank
    )
    model = Mamba3LM(shape, device="cuda")
    ids = torch.randint(512, (4, 513), device="cuda")
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].flatten(), None)

    def gradients(dtype, trains):
        monkeypatch.setattr(kernels, "TRAINS", trains)
        model.zero_grad()
        Objective(model, dtype)(batch)[0].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    truth = gradients(torch.float32, ())
    errors = []
    for trains in ((), (torch.bfloat16,)):
        found = gradients(torch.bfloat16, trains)
        errors.append({name: ((found[name] - v).norm() / v.norm()).item() for name, v in truth.items()})
    chunked, ours = errors
    middle = statistics.median(chunked.values())
    worse = {name: (error, chunked[name]) for name, error in ours.items() if error > 2 * max(chunked[name], middle)}
    assert not worse, worse
