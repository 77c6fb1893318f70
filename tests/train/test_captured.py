"""A captured pass is the pass: losses, gradients, skipped steps, resumption. A graph is imitated by the function itself."""

import dataclasses

import pytest
import torch

from mamba3.train import Reporter, TrainConfig, captured, prepare
from mamba3.train.captured import CapturedPass
from mamba3.train.objective import Objective
from mamba3.train.packing import Batch
from mamba3.train.ranks import Ranks
from tests.train.test_trainer import CONFIG, corpus, losses, shape, train, weights

__all__ = ["corpus"]  # a fixture

ROWS = dataclasses.replace(CONFIG, layout="rows", seq_len=8, batch_tokens=64)
CPU = torch.device("cpu")


class Notes(Reporter):
    def __init__(self):
        self.heard = []

    def note(self, message):
        self.heard.append(message)


@pytest.fixture
def imitated(monkeypatch):
    """A device that records passes; the list holds how often one was."""
    recorded = []

    def record(run, warm_up, device):
        for _ in range(3):
            warm_up()
        recorded.append(run)
        return run

    monkeypatch.setattr(captured, "record", record)
    real = captured.why_not
    monkeypatch.setattr(captured, "why_not", lambda config, device, ranks: real(config, torch.device("cuda"), ranks))
    return recorded


@pytest.mark.parametrize("micro", [64, 16])
def test_a_captured_run_is_the_run_and_goes_on_where_it_was_killed(imitated, corpus, tmp_path, micro):
    config = dataclasses.replace(ROWS, micro_tokens=micro)
    graph = dataclasses.replace(config, graph=True)
    train(corpus, tmp_path / "plain", config)
    assert not imitated
    train(corpus, tmp_path / "whole", graph)
    assert len(imitated) == 1
    while train(corpus, tmp_path / "parts", graph, 5)[1].step < 12:
        pass
    for name in ("whole", "parts"):
        assert losses(tmp_path / name) == losses(tmp_path / "plain")
        assert weights(tmp_path / name) == weights(tmp_path / "plain")


def test_a_step_that_is_not_taken_leaves_no_gradient_behind(imitated, corpus, tmp_path):
    """One whose loss and gradient are not numbers, and one that is called a spike."""

    class Spoilt(torch.nn.Module):
        def __init__(self, objective, trainer):
            super().__init__()
            self.objective, self.trainer = objective, trainer

        def forward(self, *given, **named):
            loss, state = self.objective(*given, **named)
            return loss * (float("nan") if self.training and self.trainer().step == 3 else 1.0), state

    for name, graph in (("plain", False), ("graph", True)):
        made = prepare(corpus, tmp_path / name, dataclasses.replace(ROWS, graph=graph, eval_every=0), shape)
        made.objective = Spoilt(made.objective, lambda made=made: made)
        judge = made.watch.judge
        made.watch.judge = lambda loss, norm, made=made, judge=judge: (
            "it is a spike" if made.step == 6 else judge(loss, norm)
        )
        made.run()
        assert (made.captured is not None) == graph and made.watch.not_finite == 1
    plain, graph = losses(tmp_path / "plain"), losses(tmp_path / "graph")
    skipped = [dict(line).get("skipped") for line in graph if dict(line)["kind"] == "step"]
    assert [i for i, why in enumerate(skipped) if why] == [3, 6]
    assert repr(plain) == repr(graph)  # a NaN is a NaN
    assert weights(tmp_path / "plain") == weights(tmp_path / "graph")


@pytest.mark.parametrize(
    ("change", "why"),
    [({"layout": "packed"}, "layout is 'packed'"), ({}, "cannot be captured here"), ({}, "as a graph its loss")],
    ids=["packed", "not recordable", "another result"],
)
def test_what_cannot_be_captured_is_trained_without_and_said(imitated, corpus, tmp_path, monkeypatch, change, why):
    def refused(run, warm_up, device):
        warm_up()
        raise RuntimeError("cannot be captured here\nand a long story")

    def nothing(run, warm_up, device):  # a graph of nothing
        warm_up()
        return lambda: None

    if not change:
        monkeypatch.setattr(captured, "record", refused if "cannot" in why else nothing)
    config, notes = dataclasses.replace(ROWS, **change), Notes()
    train(corpus, tmp_path / "plain", config)
    made, _ = train(corpus, tmp_path / "graph", dataclasses.replace(config, graph=True), reporter=notes)
    assert made.captured is None
    assert len([text for text in notes.heard if f"without a CUDA graph: {why}" in text and "long" not in text]) == 1
    assert losses(tmp_path / "graph") == losses(tmp_path / "plain")
    assert weights(tmp_path / "graph") == weights(tmp_path / "plain")


def test_a_processor_and_several_ranks_have_no_graph():
    assert "CUDA device" in (captured.why_not(ROWS, CPU, Ranks()) or "")
    assert "2 ranks" in (captured.why_not(ROWS, torch.device("cuda"), Ranks(size=2)) or "")
    assert captured.why_not(ROWS, torch.device("cuda"), Ranks()) is None


def test_a_captured_pass_adds_to_the_gradient_and_clears_what_is_no_number(imitated):
    from mamba3.lm import Mamba3LM

    model = Mamba3LM(shape(32))
    idle = model.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
    ids = torch.randint(0, 32, (2, 2, 9))
    batches = [Batch(rows[:, :-1].contiguous(), rows[:, 1:].flatten(), None) for rows in ids]
    made = CapturedPass(Objective(model), batches[0], 2, CPU)
    assert idle is None and model.idle.grad is None  # no weight decay for what the loss does not reach
    found = [made(batch) for batch in batches]
    gradient = model.embedding.weight.grad.clone()
    model.zero_grad()
    expected = [Objective(model)(batch)[0] for batch in batches]
    (sum(expected) / 2).backward()
    assert torch.equal(torch.stack(found), torch.stack(expected).detach())
    torch.testing.assert_close(gradient, model.embedding.weight.grad)
    model.embedding.weight.grad.fill_(float("nan"))
    made.clear()
    assert not model.embedding.weight.grad.any()


def test_each_steps_batches_are_made_once_and_before_the_host_waits_for_the_step_before(corpus, tmp_path):
    made = prepare(corpus, tmp_path / "run", CONFIG, shape)
    order, passes, judge = [], made.data.passes, made.watch.judge
    made.data.passes = lambda step: order.append(("batch", step)) or passes(step)
    made.watch.judge = lambda loss, norm: order.append(("judged", made.step)) or judge(loss, norm)
    made.run()
    assert [step for what, step in order if what == "batch"] == list(range(CONFIG.steps))
    for step in range(CONFIG.steps - 1):
        assert order.index(("batch", step + 1)) < order.index(("judged", step))


@pytest.mark.gpu
@pytest.mark.parametrize("micro", [4096, 2048])
def test_a_captured_run_is_the_run_on_a_gpu(corpus, tmp_path, micro):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"number {i} and the words after it, {i * i % 97} of them" for i in range(4000)))
    config = TrainConfig(
        steps=8, warmup_steps=2, layout="rows", seq_len=256, batch_tokens=4096, micro_tokens=micro, dtype="bfloat16",
        val_fraction=0, eval_every=0, save_every=4,
    )  # fmt: skip
    notes = Notes()
    for name, graph in (("plain", False), ("graph", True)):
        made, _ = train(path, tmp_path / name, dataclasses.replace(config, graph=graph), device="cuda", reporter=notes)
        assert (made.captured is not None) == graph, notes.heard
    for one, two in zip(losses(tmp_path / "plain"), losses(tmp_path / "graph"), strict=True):
        assert dict(one)["loss"] == pytest.approx(dict(two)["loss"], rel=2e-3)
