"""Laws of the loop, the checkpoints and resuming."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.train import NonFiniteError, Reporter, TrainConfig, checkpoint, export, plot, prepare, trainer
from mamba3.train.checkpoint import CheckpointError
from mamba3.train.evaluate import evaluate
from mamba3.train.objective import Objective, batch_loss
from mamba3.train.packing import Batch
from mamba3.train.report import read_metrics

CONFIG = TrainConfig(
    steps=12, warmup_steps=2, seq_len=16, batch_tokens=48, val_fraction=0.2, eval_every=5, eval_tokens=64, save_every=4,
    keep=2, lr=5e-3,
)  # fmt: skip
SHAPE = {"d_model": 16, "layers": ("mamba3",), "d_state": 8, "headdim": 8, "d_intermediate": 16}
COMMAND = [
    "--steps", "12", "--warmup-steps", "2", "--seq-len", "16", "--batch-tokens", "48", "--val-fraction", "0.2",
    "--eval-every", "5", "--eval-tokens", "64", "--lr", "5e-3", "--d-model", "16", "--layers", "1", "--d-state", "8",
    "--headdim", "8", "--d-intermediate", "16", "--device", "cpu",
]  # fmt: skip


def shape(vocabulary: int) -> Mamba3Config:
    return Mamba3Config(vocab_size=vocabulary, **SHAPE)


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"number {i} and the words after it\n" * (1 + i % 3)}) for i in range(30)]
    path.write_text("\n".join(lines) + "\n")
    return path


def train(corpus: Path, run: Path, config: TrainConfig = CONFIG, stop_after: int | None = None, **options):
    """(trainer, outcome); `stop_after` steps of this call end it as Ctrl-C does."""
    made = prepare(corpus, run, config, shape, **options)
    last = math.inf if stop_after is None else made.step + stop_after
    return made, made.run(lambda: made.step >= last)


def losses(run: Path) -> list[tuple]:
    """Everything in metrics.jsonl but times."""
    lines = read_metrics(run / "metrics.jsonl")
    return [tuple((k, v) for k, v in line.items() if k != "seconds") for line in lines]


def weights(run: Path) -> bytes:
    return (checkpoint.list_checkpoints(run)[-1] / "model.safetensors").read_bytes()


# -- the loop


def test_a_run_learns_and_leaves_what_it_promises(corpus, tmp_path):
    run = tmp_path / "run"
    made, outcome = train(corpus, run, TrainConfig(**{**CONFIG.to_dict(), "steps": 40}))
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    validations = [line for line in lines if line["kind"] == "val"]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert [line["step"] for line in validations] == [0, *range(5, 41, 5)]
    assert validations[-1]["loss"] < 0.8 * validations[0]["loss"]
    assert validations[-1]["perplexity"] == pytest.approx(math.exp(validations[-1]["loss"]))
    assert outcome.validation is not None and outcome.validation.loss == validations[-1]["loss"]
    assert (outcome.step, outcome.stopped, outcome.loss) == (40, False, steps[-1]["loss"])
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [place.name for place in checkpoint.list_checkpoints(run)] == ["step-00000036", "step-00000040"]
    place = export(made)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(f.name for f in place.iterdir()) == files
    for folder in (place, checkpoint.list_checkpoints(run)[-1]):
        for a, b in zip(Mamba3LM.from_pretrained(folder).parameters(), made.model.parameters(), strict=True):
            assert a.equal(b)


def test_packed_loss_is_the_mean_over_the_documents_alone():
    torch.manual_seed(0)
    model = Mamba3LM(shape(257))
    ids = torch.randint(0, 257, (1, 20))
    targets = torch.randint(0, 257, (20,))
    packed = batch_loss(model, Batch(ids, targets, torch.tensor([0, 7, 20], dtype=torch.int32)), torch.float32, "sum")
    alone = sum(
        batch_loss(
            model, Batch(ids[:, a:b], targets[a:b], torch.tensor([0, b - a], dtype=torch.int32)), torch.float32, "sum"
        )
        for a, b in ((0, 7), (7, 20))
    )
    torch.testing.assert_close(packed, alone)


def test_evaluation_does_not_depend_on_the_batches_and_leaves_the_model_training(corpus, tmp_path):
    made, _ = train(corpus, tmp_path / "run", stop_after=1)
    val = made.data.val
    assert val is not None
    sizes = made.token_sizes
    results = []
    for batch_tokens in (16, 50, 1000):
        val.batch_tokens = batch_tokens
        results.append(evaluate(made.objective, val.sample(), device=made.device, sizes=sizes))
    assert len({r.tokens for r in results}) == len({r.bytes for r in results}) == 1
    assert [r.nats for r in results] == pytest.approx([results[0].nats] * 3, rel=1e-5)
    assert results[0].bits_per_byte == pytest.approx(results[0].nats / math.log(2) / results[0].bytes)
    assert made.model.training


def test_bfloat16_autocast_trains_float32_parameters(corpus, tmp_path):
    made, outcome = train(corpus, tmp_path / "run", TrainConfig(**{**CONFIG.to_dict(), "dtype": "bfloat16"}))
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert outcome.validation is not None and outcome.validation.loss < math.log(257)


def test_without_held_out_documents_nothing_is_validated(corpus, tmp_path):
    _, outcome = train(corpus, tmp_path / "run", TrainConfig(**{**CONFIG.to_dict(), "val_fraction": 0.0}))
    assert outcome.validation is None
    assert {line["kind"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")} == {"step"}


def spoil(monkeypatch, made, at, by):
    """The loss of the steps `at` (0 the first) is multiplied by `by`."""
    whole = Objective.forward

    def forward(self, *arguments, **settings):
        loss, state = whole(self, *arguments, **settings)
        return loss * (by if self.training and made.step in at else 1.0), state

    monkeypatch.setattr(Objective, "forward", forward)


def test_steps_that_are_not_finite_are_skipped_counted_and_reported(corpus, tmp_path, monkeypatch):
    made = prepare(corpus, tmp_path / "run", CONFIG, shape)
    spoil(monkeypatch, made, (6, 8), math.nan)
    assert made.run().step == 12
    steps = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps if line["skipped"]] == [7, 9]
    assert {line["skipped"] for line in steps} == {None, "the loss is nan"} and steps[-1]["skips"] == 2
    assert all(bool(torch.isfinite(p).all()) for p in made.model.parameters())


def test_steps_that_are_never_finite_end_the_run_and_keep_the_last_checkpoint(corpus, tmp_path, monkeypatch):
    made = prepare(corpus, tmp_path / "run", TrainConfig(**{**CONFIG.to_dict(), "max_skipped": 3}), shape)
    spoil(monkeypatch, made, range(4, 12), math.inf)
    before = None

    def stop():
        nonlocal before
        if made.step == 4:
            before = [p.detach().clone() for p in made.model.parameters()]
        return False

    with pytest.raises(
        NonFiniteError, match=r"at step 7 the loss is inf; 3 steps in a row were not taken and step 4 is"
    ):
        made.run(stop)
    assert before is not None and all(a.equal(b) for a, b in zip(before, made.model.parameters(), strict=True))
    assert [place.name for place in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-00000004"]


def test_a_spike_is_skipped_and_what_is_skipped_survives_a_kill(corpus, tmp_path, monkeypatch):
    config = TrainConfig(**{**CONFIG.to_dict(), "steps": 24, "spike": 6.0})
    for name, parts in (("whole", (24,)), ("parts", (21, 3))):
        for part in parts:
            made = prepare(corpus, tmp_path / name, config, shape)
            with monkeypatch.context() as patch:
                spoil(patch, made, (18, 20), 3.0)
                last = made.step + part
                made.run(lambda made=made, last=last: made.step >= last)
    steps = [line for line in read_metrics(tmp_path / "parts" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps if line["skipped"]] == [19, 21] and steps[-1]["skips"] == 2
    assert all("a spike: above" in line["skipped"] for line in steps if line["skipped"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_missing_matplotlib_is_told_once_and_the_run_goes_on(corpus, tmp_path, monkeypatch):
    notes = []
    reporter = Reporter()
    reporter.note = notes.append  # type: ignore[method-assign]
    monkeypatch.setattr(trainer, "can_plot", lambda: False)
    _, outcome = train(corpus, tmp_path / "run", reporter=reporter)
    assert outcome.step == 12 and sum("matplotlib" in note for note in notes) == 1
    assert not (tmp_path / "run" / "loss.png").exists()
    assert plot.can_plot()


# -- resuming


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_a_run_in_parts_is_bitwise_the_run_in_one(corpus, tmp_path, stop_after, tokenizer):
    config = TrainConfig(**{**CONFIG.to_dict(), "tokenizer": tokenizer})
    train(corpus, tmp_path / "whole", config)
    while train(corpus, tmp_path / "parts", config, stop_after)[1].step < 12:
        torch.rand(3)  # whatever the process draws in between is of no account
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_in_parts_is_bitwise_the_run_in_one_on_a_gpu(corpus, tmp_path, dtype):
    config = TrainConfig(**{**CONFIG.to_dict(), "dtype": dtype})
    train(corpus, tmp_path / "whole", config, device="cuda")
    for _ in range(3):
        train(corpus, tmp_path / "parts", config, 5, device="cuda")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_run_goes_on_from_where_no_step_was_ever_taken(corpus, tmp_path, monkeypatch):
    judge = trainer.Watch.judge

    def refuse_five(self, loss, norm):
        if self.not_finite < 5:
            self.not_finite += 1
            return "a test says so"
        return judge(self, loss, norm)

    monkeypatch.setattr(trainer.Watch, "judge", refuse_five)
    train(corpus, tmp_path / "whole")
    made, _ = train(corpus, tmp_path / "parts", stop_after=4)
    assert not made.optimizer.state and made.watch.skipped == 4
    assert train(corpus, tmp_path / "parts")[1].step == 12
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_that_began_on_a_cpu_goes_on_where_there_is_a_gpu(corpus, tmp_path, monkeypatch):
    """Whose generator has a state too, which the checkpoint does not hold."""
    train(corpus, tmp_path / "run", stop_after=4)
    here = checkpoint.random_state
    monkeypatch.setattr(
        checkpoint, "random_state", lambda: here() | {"random/cuda": torch.zeros(16, dtype=torch.uint8)}
    )
    assert train(corpus, tmp_path / "run")[1].step == 12


@pytest.mark.gpu
def test_a_run_that_began_on_a_cpu_goes_on_on_a_gpu_and_back(corpus, tmp_path):
    for device in ("cpu", "cuda", "cpu"):
        made, _ = train(corpus, tmp_path / "run", stop_after=4, device=device)
    assert made.step == 12 and all(math.isfinite(dict(line)["loss"]) for line in losses(tmp_path / "run"))


def plateau(**changes) -> TrainConfig:
    values = {"schedule": "wsd", "steps": 1000, "decay_fraction": 0.001, "min_lr_fraction": 0.07}
    return TrainConfig(**{**CONFIG.to_dict(), **values, **changes})


def test_a_plateau_that_falls_when_told_is_the_run_that_was_planned_so(corpus, tmp_path):
    planned = plateau(steps=10, decay_fraction=0.4, eval_every=0)
    train(corpus, tmp_path / "planned", planned)
    made, _ = train(corpus, tmp_path / "told", plateau(eval_every=0), stop_after=6)
    made.replan(planned)
    assert made.run().step == 10
    told = [line for line in losses(tmp_path / "told") if dict(line)["kind"] == "step"]
    assert told == [line for line in losses(tmp_path / "planned") if dict(line)["kind"] == "step"]
    assert weights(tmp_path / "told") == weights(tmp_path / "planned")


def test_a_run_keeps_the_rates_it_has_had(corpus, tmp_path):
    made, _ = train(corpus, tmp_path / "run", plateau(), stop_after=6)
    with pytest.raises(ValueError, match=r"step 4 had 0\.005, not .*begin at step 6 or later"):
        made.replan(plateau(steps=9, decay_fraction=5 / 9))
    with pytest.raises(ValueError, match=r"weight_decay was 0\.1 and is 0\.2; change steps, decay_fraction alone"):
        made.replan(plateau(weight_decay=0.2))


@pytest.mark.parametrize("step", [0, 2, 6])
def test_steps_beyond_the_last_checkpoint_are_done_again(corpus, tmp_path, monkeypatch, step):
    train(corpus, tmp_path / "whole")
    made = prepare(corpus, tmp_path / "cut", CONFIG, shape)
    take = trainer.Trainer._take_step

    def die(self):
        if self.step == step:
            raise MemoryError
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take_step", die)
        with pytest.raises(MemoryError):
            made.run()
    metrics = tmp_path / "cut" / "metrics.jsonl"
    assert len(losses(tmp_path / "cut")) > step
    with metrics.open("a") as file:
        file.write('{"kind": "step", "step": 7, "lo')  # cut short by the kill
    train(corpus, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_finished_run_stays_finished_and_restart_begins_anew(corpus, tmp_path):
    run = tmp_path / "run"
    train(corpus, run)
    before = losses(run)
    made, outcome = train(corpus, run)
    assert (made.step, outcome.loss, losses(run)) == (12, None, before)
    assert (export(made) / "model.safetensors").read_bytes() == weights(run)
    with pytest.raises(ValueError, match=r"differs in train\.seed was 0, is 1"):
        prepare(corpus, run, TrainConfig(**{**CONFIG.to_dict(), "seed": 1}), shape)
    made, _ = train(corpus, run, TrainConfig(**{**CONFIG.to_dict(), "seed": 1}), start="restart")
    assert losses(run) != before and len(losses(run)) == len(before)


def test_a_restart_that_cannot_begin_removes_nothing(corpus, tmp_path):
    run = tmp_path / "run"
    train(corpus, run, stop_after=1)
    files = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with pytest.raises(ValueError):
        prepare(tmp_path / "absent", run, CONFIG, shape, start="restart")
    with pytest.raises(ValueError):
        prepare(corpus, run, CONFIG, lambda n: Mamba3Config(vocab_size=n, **{**SHAPE, "headdim": 7}), start="restart")
    assert files == {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}


def test_resuming_demands_a_checkpoint(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"must hold a checkpoint, but .* has none"):
        prepare(corpus, tmp_path / "run", CONFIG, shape, start="resume")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_names_the_fields_and_stays_as_it_is(corpus, tmp_path):
    run = tmp_path / "run"
    train(corpus, run, stop_after=1)
    files = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    config = TrainConfig(**{**CONFIG.to_dict(), "lr": 1e-2, "tokenizer": "bpe", "eval_every": 1})

    def wider(vocabulary):
        return Mamba3Config(vocab_size=vocabulary, **{**SHAPE, "d_state": 16})

    with pytest.raises(ValueError) as error:
        prepare(corpus, run, config, wider)
    for field in ("train.lr was 0.005, is 0.01", "train.tokenizer was 'byte', is 'bpe'", "model.d_state was 8, is 16"):
        assert field in str(error.value)
    assert "eval_every" not in str(error.value)
    assert files == {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"differs in corpus was '\w+', is '\w+'\. Give"):
        prepare(corpus, run, CONFIG, shape)


def test_bookkeeping_may_change_between_parts(corpus, tmp_path):
    train(corpus, tmp_path / "whole")
    train(corpus, tmp_path / "parts", stop_after=5)
    config = TrainConfig(**{**CONFIG.to_dict(), "eval_every": 0, "save_every": 1, "keep": 1})
    train(corpus, tmp_path / "parts", config)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert len(checkpoint.list_checkpoints(tmp_path / "parts")) == 1


# -- damage


@pytest.mark.parametrize("name", ["model.safetensors", "training/__0_0.distcp", "config.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncated", "removed", "altered"])
def test_a_damaged_checkpoint_is_refused_with_the_file_and_the_way_out(corpus, tmp_path, name, damage):
    run = tmp_path / "run"
    train(corpus, run, stop_after=5)
    newest = checkpoint.list_checkpoints(run)[-1]
    file = newest / name
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "removed":
        file.unlink()
    elif name == "checkpoint.json":
        file.write_text("{}")
    else:
        file.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(ValueError, match=f"{newest.name} {name} .*Remove that folder to resume from the one before"):
        prepare(corpus, run, CONFIG, shape)
    shutil.rmtree(newest)
    made, _ = train(corpus, run)
    assert made.step == 12


def fail_with_full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["async_save", "sha256_of", "shutil.copy", "model", "publish"])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(corpus, tmp_path, monkeypatch, where):
    run = tmp_path / "run"
    train(corpus, run, stop_after=4)
    before = {f: f.read_bytes() for f in (run / "checkpoints").rglob("*") if f.is_file()}
    made = prepare(corpus, run, CONFIG, shape)
    with monkeypatch.context() as patch:
        if where == "model":
            patch.setattr(Mamba3LM, "save_pretrained", fail_with_full_disk)
        elif where == "shutil.copy":
            patch.setattr(shutil, "copy", fail_with_full_disk)
        else:
            patch.setattr(f"mamba3.train.saver.{where}", fail_with_full_disk)
        with pytest.raises(CheckpointError, match=r"step 8 could not be saved .*step-00000004 is intact.*disk is full"):
            made.run()
    assert before == {f: f.read_bytes() for f in (run / "checkpoints").rglob("*") if f.is_file()}
    train(corpus, run)
    train(corpus, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


@contextmanager
def largest_file(size: int):
    """Within the block the system refuses to write a file beyond `size` bytes, as a full disk would."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses_leaves_the_last_checkpoint(corpus, tmp_path):
    run = tmp_path / "run"
    made, _ = train(corpus, run, stop_after=4)
    before = {f: f.read_bytes() for f in (run / "checkpoints").rglob("*") if f.is_file()}
    made.step = 5
    with largest_file(1 << 13), pytest.raises(CheckpointError, match=r"step 5 could not be .*step-00000004 is intact"):
        made._save()
        made.saver.wait()
    assert before == {f: f.read_bytes() for f in (run / "checkpoints").rglob("*") if f.is_file()}


def test_a_full_disk_elsewhere_is_told_with_the_file_and_the_run_goes_on_later(corpus, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mamba3.train.store.np.save", fail_with_full_disk)
        with pytest.raises(OSError, match=r"tokens could not be written to .* nothing was left there"):
            prepare(corpus, run, CONFIG, shape)
    assert not list((run / "data").iterdir())
    made, _ = train(corpus, run, stop_after=4)
    made = prepare(corpus, run, CONFIG, shape)
    limit = (run / "metrics.jsonl").stat().st_size + 10
    with largest_file(limit), pytest.raises(OSError, match=r"metrics\.jsonl could not be written at step 5"):
        made.run()
    train(corpus, run)
    train(corpus, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


def test_no_space_for_the_first_checkpoint_says_that_there_is_none(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("mamba3.train.saver.async_save", fail_with_full_disk)
    with pytest.raises(CheckpointError, match="there was no earlier checkpoint"):
        train(corpus, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


# -- a real kill


def kill_and_finish(corpus: Path, run: Path, save_every: int, kills: list[int]) -> int:
    """Kill -9 the command when it has done so many steps, for each of `kills`, then let it finish. Returns kills done."""
    command = [sys.executable, "-m", "mamba3.cli", "train", str(corpus), "--out", str(run), *COMMAND]
    command += ["--save-every", str(save_every)]
    done = 0
    for at in kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(read_metrics(run / "metrics.jsonl")) < at:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return done


def test_after_kill_9_the_losses_are_bitwise_those_of_a_run_that_was_not_killed(corpus, tmp_path):
    train(corpus, tmp_path / "whole", TrainConfig(**{**CONFIG.to_dict(), "save_every": 2}))
    assert kill_and_finish(corpus, tmp_path / "killed", 2, [6]) == 1
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_any_number_of_kills_changes_nothing_on_two_threads(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    train(corpus, tmp_path / "whole", TrainConfig(**{**CONFIG.to_dict(), "save_every": 3}))
    assert kill_and_finish(corpus, tmp_path / "killed", 3, [1, 2, 5, 6, 9, 12]) > 2
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_the_tokenizer_of_another_checkpoint_is_named_whatever_its_size(corpus, tmp_path):
    for size in (280, 300):
        config = TrainConfig(**{**CONFIG.to_dict(), "tokenizer": "bpe", "vocab_size": size, "steps": 4})
        prepare(corpus, tmp_path / f"made-{size}", config, shape)
    first, second = (str(tmp_path / f"made-{size}" / "tokenizer.json") for size in (280, 300))
    config = TrainConfig(**{**CONFIG.to_dict(), "tokenizer": first, "steps": 4})
    train(corpus, tmp_path / "run", config)
    before = weights(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"goes on with the tokenizer it began with.*every token would mean something else"
    ):
        prepare(corpus, tmp_path / "run", TrainConfig(**{**config.to_dict(), "tokenizer": second}), shape)
    with pytest.raises(
        ValueError, match=r"train\.lr was .*; the tokenizer is another one.*something else\. Give"
    ) as told:
        prepare(corpus, tmp_path / "run", TrainConfig(**{**config.to_dict(), "tokenizer": second, "lr": 1e-4}), shape)
    assert not any(len(word) == 66 for word in str(told.value).split())  # no digests
    assert weights(tmp_path / "run") == before
