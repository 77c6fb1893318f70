"""Laws of training side by side: stacked = separate, resumed = uninterrupted, a diverged model harms no other."""

import json

import pytest
import torch
import torch.nn.functional as F

from mamba3.lm import Mamba3LM
from mamba3.tasks import make_task
from mamba3.tasks.fit import CHECKPOINT, NonFiniteError, evaluate, fit, read_losses, training_batch
from mamba3.tasks.models import KINDS, model_config
from mamba3.tasks.settings import PAPER_RATES, Settings
from mamba3.tasks.stack import Stack

SIZES = {"d_model": 16, "layers": 1, "d_state": 8, "headdim": 16}


def small(kind="mamba3", task="parity", **fields):
    sizes = SIZES | ({"attn_heads": 2} if kind == "transformer" else {}) | fields
    return model_config(task, make_task(task).vocab_size, kind, **sizes)


def settings(**changes):
    plain = {"stages": (5, 9), "steps": 4, "batch": 8, "ranges": ((12, 12), (4, 12)), "sequences": 64, "save_every": 3}
    return Settings(**(plain | changes))


def train(config, chosen, steps, task="parity"):
    stack = Stack(config, tuple(seed for _, seed in chosen.runs), chosen, "cpu")
    losses = []
    for step in range(steps):
        batch = training_batch(make_task(task), chosen, step, "cpu")
        rates = torch.tensor([chosen.rate(step, peak) for peak, _ in chosen.runs])
        losses.append(stack.step(batch.inputs, batch.positions, batch.answers, rates, step + 1))
    return stack, torch.stack(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_side_by_side_is_separate_training(kind):
    """Every kind of model: two rates and two seeds at once against each alone, losses and parameters."""
    together, losses = train(small(kind), settings(rates=(1e-3, 3e-3), seeds=(0, 1)), 4)
    for i, (rate, seed) in enumerate(together.settings.runs):
        alone, own = train(small(kind), settings(rates=(rate,), seeds=(seed,)), 4)
        torch.testing.assert_close(losses[:, i], own[:, 0], rtol=1e-4, atol=1e-6)
        for name, value in alone.parameters.items():
            # Adam divides by the gradient's size: where that is rounding error, so is the direction of the first steps.
            torch.testing.assert_close(together.parameters[name][i], value[0], rtol=1e-3, atol=1e-4)


def test_a_stack_of_one_is_torch_adamw():
    """The same model under torch.optim.AdamW with clip_grad_norm_, decay groups and rates of its own."""
    chosen = settings(rates=(1e-2,), seeds=(3,), clip=0.5, weight_decay=0.3)
    stack, losses = train(small(), chosen, 6)
    torch.manual_seed(3)
    model = Mamba3LM(small())
    named = dict(model.named_parameters())
    decayed = [n for n, p in named.items() if p.ndim >= 2 and n.rpartition(".")[2] not in ("B_bias", "C_bias")]
    groups = [
        {"params": [named[n] for n in decayed], "weight_decay": 0.3},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=chosen.betas, eps=chosen.eps)
    for step in range(6):
        batch = training_batch(make_task("parity"), chosen, step, "cpu")
        inputs, positions, answers = batch.inputs[0], batch.positions[0], batch.answers[0]
        targets = torch.full_like(inputs, -1).scatter(1, positions, answers)
        loss = F.cross_entropy(model(inputs)[..., :3].flatten(0, 1), targets.flatten(), ignore_index=-1)
        torch.testing.assert_close(loss.detach(), losses[step, 0], rtol=1e-4, atol=1e-6)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate(step, 1e-2)
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(stack.parameters[f"model.{name}"][0], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop_after", [2, 5])
def test_a_stopped_run_resumes_with_the_same_losses(tmp_path, stop_after):
    chosen, task, config = settings(rates=(1e-3, 1e-2)), make_task("parity"), small()
    whole = fit(task, config, chosen, tmp_path / "whole")
    calls = iter(range(100))
    assert fit(task, config, chosen, tmp_path / "cut", should_stop=lambda: next(calls) == stop_after) is None
    assert len(read_losses(tmp_path / "cut")) == stop_after
    resumed = fit(task, config, chosen, tmp_path / "cut")
    assert read_losses(tmp_path / "whole").equal(read_losses(tmp_path / "cut"))
    assert whole is not None and resumed is not None and whole["runs"] == resumed["runs"]


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path):
    """The process dies between two checkpoints: what it did since is done again, to the bit."""
    chosen, task, config = settings(), make_task("parity"), small()
    fit(task, config, chosen, tmp_path / "whole")

    def die():
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return False

    calls = []
    with pytest.raises(KeyboardInterrupt):
        fit(task, config, chosen, tmp_path / "cut", should_stop=die)
    assert len(read_losses(tmp_path / "cut")) == 3
    fit(task, config, chosen, tmp_path / "cut")
    assert read_losses(tmp_path / "whole").equal(read_losses(tmp_path / "cut"))


def test_results_and_best_model(tmp_path):
    """results.json agrees with the saved model, evaluated one sequence at a time; a finished run is not repeated."""
    task, chosen = make_task("parity"), settings(rates=(1e-3, 1e-2), seeds=(0, 1), ranges=((12, 12),), sequences=40)
    results = fit(task, small(), chosen, tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    scores = [run["scaled"]["12-12"] for run in results["runs"]]
    assert scores[results["best"]] == max(scores)
    stack = Stack(small(), (0, 1, 0, 1), chosen, "cpu")
    (tmp_path / "again").mkdir()
    model = Mamba3LM.from_pretrained(tmp_path / "best").eval()
    for name in stack.parameters:
        stack.parameters[name].data[:] = model.state_dict()[name.removeprefix("model.")]
    again = evaluate(task, stack, 12, 12, 40)
    assert again == [again[0]] * 4 and 100 * task.scaled_accuracy(again[0]) == max(scores)
    assert fit(task, small(), chosen, tmp_path, should_stop=lambda: 1 / 0) == results


def test_another_run_is_refused(tmp_path):
    fit(make_task("parity"), small(), settings(), tmp_path)
    with pytest.raises(ValueError, match=r"fit\.batch was 8, is 9"):
        fit(make_task("parity"), small(), settings(batch=9), tmp_path)
    (tmp_path / "results.json").unlink()
    with pytest.raises(ValueError, match=r"model\.d_state was 8, is 16"):
        fit(make_task("parity"), small(d_state=16), settings(), tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"short")
    with pytest.raises(ValueError, match="must be a whole checkpoint"):
        fit(make_task("parity"), small(), settings(), tmp_path)


def test_a_diverged_model_stops_and_the_others_go_on():
    chosen = settings(rates=(1e-3, 2e-3))
    healthy, expected = train(small(), chosen, 4)
    sick = Stack(small(), (0, 0), chosen, "cpu")
    with torch.no_grad():
        sick.parameters["model.layers.0.mixer.D"][0] = torch.nan
    before = {name: v[0].clone() for name, v in sick.parameters.items()}
    for step in range(4):
        batch = training_batch(make_task("parity"), chosen, step, "cpu")
        rates = torch.tensor([chosen.rate(step, peak) for peak, _ in chosen.runs])
        losses = sick.step(batch.inputs, batch.positions, batch.answers, rates, step + 1)
        assert losses[1] == expected[step, 1] and losses[0].isnan()
    assert sick.alive.tolist() == [False, True]
    for name, value in sick.parameters.items():
        torch.testing.assert_close(value[0], before[name], rtol=0, atol=0, equal_nan=True)
        assert value[1].equal(healthy.parameters[name][1])


def test_no_model_left_is_an_error(tmp_path):
    with pytest.raises(NonFiniteError, match="none of the 1 models"):
        fit(make_task("parity"), small(), settings(rates=(1e38,), steps=10, warmup=0.0, weight_decay=1e30), tmp_path)


def test_seeds_have_their_own_sequences_and_rates_share_them():
    chosen = settings(rates=(1e-3, 1e-2), seeds=(0, 1))
    inputs = training_batch(make_task("parity"), chosen, 5, "cpu").inputs
    assert inputs.shape == (4, 8, 8)
    assert inputs[0].equal(inputs[1]) and inputs[2].equal(inputs[3]) and not inputs[0].equal(inputs[2])
    alone = training_batch(make_task("parity"), settings(rates=(5e-3,), seeds=(1,)), 5, "cpu").inputs
    assert alone[0].equal(inputs[2])


@pytest.mark.parametrize("task", ["arithmetic", "arithmetic-brackets", "mqar"])
def test_every_task_trains(tmp_path, task):
    stages = (8, 16) if task == "mqar" else (5, 9)
    results = fit(make_task(task), small(task=task), settings(stages=stages, ranges=((16, 16),)), tmp_path)
    assert results is not None and -50 <= results["runs"][0]["scaled"]["16-16"] <= 100


def test_settings_state_their_laws():
    assert PAPER_RATES[0] == 1e-4 and PAPER_RATES[-1] == 1e-2 and len(PAPER_RATES) == 8
    chosen = Settings(steps=100, stages=(40, 160), warmup=0.1, last_rate=1e-6)
    assert chosen.rate(19, 1e-3) == 1e-3 and chosen.rate(199, 1e-3) == pytest.approx(1e-6)
    assert all(chosen.rate(k, 1e-3) > chosen.rate(k + 1, 1e-3) for k in range(20, 199))
    with pytest.raises(ValueError, match="must not repeat"):
        Settings(rates=(1e-3, 1e-3))
    with pytest.raises(ValueError, match="a model is one of mamba3, mamba3-mimo"):
        model_config("parity", 3, "lstm")


@pytest.mark.slow
def test_parity_is_learned(tmp_path):
    """One layer, 32 channels, bits of up to 12: answered without an error a few minutes later."""
    chosen = Settings(rates=(1e-2,), stages=(6, 12), steps=400, batch=64, ranges=((3, 12),), sequences=1000)
    results = fit(make_task("parity"), model_config("parity", 3, "mamba3", headdim=32), chosen, tmp_path)
    assert results is not None and results["runs"][0]["scaled"]["3-12"] > 95
