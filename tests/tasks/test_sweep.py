"""Laws of a sweep: its step is the stack's, stopped = uninterrupted, the worst go, the best weights are judged."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from mamba3.lm import Mamba3LM
from mamba3.tasks import make_task, sweep
from mamba3.tasks.captured import Captured
from mamba3.tasks.entrants import Apart, Folded, Mapped
from mamba3.tasks.fit import CHECKPOINT, training_batch
from mamba3.tasks.models import model_config
from mamba3.tasks.peers import peer
from mamba3.tasks.plan import Member, Plan, draw_block, stage_groups
from mamba3.tasks.settings import Settings
from mamba3.tasks.stack import Stack
from mamba3.tasks.sweep import Sweep, accuracies

CPU = torch.device("cpu")
SIZES = {"d_model": 16, "layers": 2, "d_state": 8, "headdim": 16}
SETTINGS = Settings(
    stages=(9, 17), steps=6, batch=8, ranges=((24, 24), (5, 24), (40, 40)), sequences=64, long_sequences=16
)


def plan(kinds=("mamba3",), rates=(1e-3, 3e-3), keep=(2, 2), task="arithmetic", **changes):
    members = tuple(Member(kind, rate, 0) for kind in kinds for rate in rates)
    return Plan(task, 16, members, replace(SETTINGS, **changes), keep, (1, *(2,) * (len(keep) - 1)))


def models(chosen):
    task = make_task(chosen.task)
    configs = [
        model_config(
            task.name, task.vocab_size, m.kind, **(SIZES | ({"attn_heads": 2} if m.kind == "transformer" else {}))
        )
        for m in chosen.members
    ]
    seeds = [m.seed for m in chosen.members]
    return Mapped(configs[0], seeds) if chosen.members[0].kind == "transformer" else Folded(configs, seeds)


def run(chosen, folder, *, validate_every=500, **more):
    one = Sweep(chosen, models(chosen), folder, CPU, validate_every=validate_every, say=lambda text: None)
    return one, one.run(**more)


@pytest.mark.parametrize("kind", ["mamba3", "mamba3-nobias", "transformer"])
def test_a_sweep_trains_as_the_stack_does(tmp_path, kind):
    """The same sequences, losses and weights as fit's step by step; sorted and cut into groups changes rounding alone."""
    chosen = plan((kind,))
    ours, _ = run(chosen, tmp_path)
    task, settings = make_task("arithmetic"), replace(SETTINGS, rates=(1e-3, 3e-3))
    config = models(chosen).configs[0] if kind != "transformer" else models(chosen).config
    stack, losses = Stack(config, (0, 0), settings, "cpu"), []
    for step in range(settings.total):
        batch = training_batch(task, settings, step, "cpu")
        rates = torch.tensor([settings.rate(step, peak) for peak in settings.rates])
        losses.append(stack.step(batch.inputs, batch.positions, batch.answers, rates, step + 1))
    torch.testing.assert_close(ours.training.losses, torch.stack(losses), rtol=1e-4, atol=1e-6)
    for i in range(2):
        ours.entrants.save(i, {k: v[i] for k, v in ours.training.parameters().items()}, tmp_path / str(i))
        weights = Mamba3LM.from_pretrained(tmp_path / str(i)).state_dict()
        for name, value in stack.model(i).state_dict().items():
            # Adam divides by the gradient's size: where that is rounding error, so is the direction of the first steps.
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop_at", [0, 3, 5])
def test_a_stopped_sweep_goes_on_to_the_same_end(tmp_path, stop_at):
    """Stopped in a stage or between two, models dropped or not: results equal, to the bit."""
    chosen = plan(("mamba3", "mamba3-norotation"), keep=(2, 1))
    whole, expected = run(chosen, tmp_path / "whole", validate_every=2)
    calls = iter(range(100))
    _, cut = run(chosen, tmp_path / "cut", validate_every=2, should_stop=lambda: next(calls) == stop_at)
    assert cut is None and (tmp_path / "cut" / CHECKPOINT).is_file()
    resumed, results = run(chosen, tmp_path / "cut", validate_every=2)
    assert resumed.training.losses.equal(whole.training.losses)
    assert expected is not None and results is not None
    assert results | {"training_seconds": 0} == expected | {"training_seconds": 0}
    assert not (tmp_path / "cut" / CHECKPOINT).is_file()
    assert run(chosen, tmp_path / "cut", should_stop=lambda: 1 / 0)[1] == results


@pytest.mark.parametrize(
    ("enough", "begins"), [(1e9, [0, 2, 4]), (1e-9, [0, 12, 15])], ids=["all learned at once", "nothing learned"]
)
def test_a_stage_ends_when_it_is_learned_and_leaves_the_others_their_steps(tmp_path, enough, begins):
    """All stages together take as many steps as before, and what is stopped anywhere ends as what is not."""
    chosen = replace(plan(keep=(2, 2, 2), stages=(9, 13, 17)), enough=enough, least=3)
    whole, results = run(chosen, tmp_path / "whole", validate_every=2)
    assert results is not None and results["stage_begins"] == begins
    assert int(whole.training.count) == chosen.settings.total == 18
    for stop_at in (0, 1, 5, 6, 7):  # looks at the clock, one every two steps
        looks, folder = iter(range(100)), tmp_path / f"stopped-{stop_at}"
        stop = functools.partial(lambda looks, at: next(looks) >= at, looks, stop_at)
        assert run(chosen, folder, validate_every=2, should_stop=stop)[1] is None
        again, found = run(chosen, folder, validate_every=2)
        assert torch.equal(again.training.losses, whole.training.losses)
        assert found is not None and found["runs"] == results["runs"] and found["stage_begins"] == begins


def test_a_stage_is_learned_when_half_of_the_models_that_go_on_have_learned_it():
    chosen = replace(plan(keep=(4, 3)), enough=0.1, least=2)
    losses = [0.5, 0.1, 0.05, float("inf")]
    assert chosen.learned(0, losses)  # two of the three that go on
    assert not chosen.learned(0, [0.5, 0.11, 0.05, 0.3]) and not chosen.learned(1, losses)
    assert not replace(chosen, enough=0.0).learned(0, losses)
    with pytest.raises(ValueError, match="keeps at least 1 and at most steps = 6 steps for each later one; least is 7"):
        replace(chosen, least=7)


def test_the_worst_of_each_kind_are_dropped(tmp_path):
    """Rates so high that a model learns nothing go first, of either kind; those kept train on as if alone."""
    chosen = plan(("mamba3", "mamba3-rope"), rates=(1e-3, 10.0), keep=(2, 1), warmup=0.0, steps=10)
    ours, results = run(chosen, tmp_path / "both")
    assert results is not None
    gone = sorted((d["kind"], d["rate"], d["before_stage"]) for d in results["dropped"])
    assert gone == [("mamba3", 10.0, 2), ("mamba3-rope", 10.0, 2)]
    alone, _ = run(replace(chosen, members=(Member("mamba3", 1e-3, 0),)), tmp_path / "alone")
    torch.testing.assert_close(ours.training.losses[:, 0], alone.training.losses[:, 0], rtol=1e-4, atol=1e-6)


def test_the_seeds_of_a_rate_go_together(tmp_path):
    """By the median of their losses, though one of them is better than all that stay."""
    chosen = replace(plan(rates=(1e-3, 2e-3), keep=(6, 3)), whole_rates=True)
    chosen = replace(chosen, members=tuple(Member("mamba3", rate, seed) for seed in range(3) for rate in (1e-3, 2e-3)))
    ours = Sweep(chosen, models(chosen), tmp_path, CPU, say=lambda text: None)
    ours.training.count += 6
    losses = torch.tensor([0.5, 0.1, 0.4, 0.6, 0.3, float("nan")])  # medians 0.4 and 0.6
    ours.training.losses[:6] = losses
    ours._drop(1)
    assert [chosen.members[row].rate for row in ours.rows] == [1e-3] * 3
    assert sorted(d["seed"] for d in ours.dropped) == [0, 1, 2]


def test_sweeps_of_several_threads_are_those_of_one(tmp_path):
    """Side by side, with another precision each, and one that fails in the middle: results equal, to the bit."""
    plans = [replace(plan(steps=30), precision=precision) for precision in ("high", "highest")]
    expected = [run(chosen, tmp_path / f"alone-{i}", validate_every=5)[1] for i, chosen in enumerate(plans)]
    beside = [
        Sweep(p, models(p), tmp_path / f"beside-{i}", CPU, validate_every=5, say=lambda text: None)
        for i, p in enumerate(plans)
    ]
    broken = Sweep(plan(), models(plan()), tmp_path / "broken", CPU, validate_every=2, say=lambda text: None)
    broken.entrants.forward = None  # pyright: ignore
    with ThreadPoolExecutor(3) as pool:
        failed, *found = [pool.submit(sweep.run) for sweep in (broken, *beside)]
    with pytest.raises(TypeError):
        failed.result()
    for one, alone in zip(found, expected, strict=True):
        assert one.result() | {"training_seconds": 0} == alone | {"training_seconds": 0}


def test_the_weights_that_validated_best_are_judged(tmp_path, monkeypatch):
    scores = iter([[0.5, 0.2], [0.4, 0.9], [0.3, 0.3], [0.2, 0.2]])
    real, seen = accuracies, []

    def scripted(task, forward, weights, batch):
        seen.append(weights.clone())
        return next(scores, None) or real(task, forward, weights, batch)

    monkeypatch.setattr(sweep, "accuracies", scripted)
    ours, results = run(plan(), tmp_path, validate_every=3)
    assert results is not None and [run["at_step"] for run in results["runs"]] == [3, 6]
    assert ours.chosen[0].equal(seen[0][0]) and ours.chosen[1].equal(seen[1][1])
    assert seen[4].equal(ours.chosen)  # what is evaluated, after four validations
    best = next(i for i, run in enumerate(results["runs"]) if run["best_of_kind"])
    saved = Mamba3LM.from_pretrained(tmp_path / "best-mamba3").state_dict()
    assert saved["embedding.weight"].equal(ours.entrants.layout.split(ours.chosen)["embedding.weight"][best])


def test_groups_hold_each_sequence_once():
    """Each step's sequences, sorted and cut, are those of the generator; a group is as wide as its longest."""
    chosen = plan(batch=16)
    groups, block = stage_groups(chosen, 1, None), draw_block("arithmetic", chosen.settings, 0, 1, 0)
    assert [len(g.tokens) for g in groups] == [6, 6] and groups[0].tokens.shape[2] <= groups[1].tokens.shape[2] == 16
    for step in range(6):
        mine = sorted(
            (tuple(t[: p + 1].tolist()), int(a))
            for g in groups
            for t, p, a in zip(g.tokens[step], g.positions[step].tolist(), g.answers[step], strict=True)
        )
        theirs = sorted(
            (tuple(int(v) for v in t[: p + 1]), int(a)) for t, p, a in zip(*(v[step] for v in block), strict=True)
        )
        assert mine == theirs


def test_another_plan_is_refused(tmp_path):
    run(plan(), tmp_path)
    with pytest.raises(ValueError, match=r"plan\.keep was"):
        run(plan(keep=(2, 1)), tmp_path)
    with pytest.raises(ValueError, match="a number for each stage"):
        plan(keep=(2,))


def test_a_diverged_model_stops_and_the_other_goes_on(tmp_path):
    chosen = plan()
    entrants = models(chosen)
    rows = entrants.weights.clone()
    rows[0, -1] = torch.nan
    training = Captured(entrants.layout, rows, entrants.exist, [1e-3, 3e-3], chosen.settings, CPU)
    training.start_stage(entrants.forward([0, 1], CPU), stage_groups(chosen, 0, None), 0)
    training.advance(4)
    assert training.alive.tolist() == [False, True] and training.losses[:4, 0].isnan().all()
    assert training.weights[0, :-1].equal(rows[0, :-1]) and not training.weights[1].equal(rows[1])
    assert training.losses[:4, 1].isfinite().all() and training.weights[1].isfinite().all()


def test_a_peer_trains_in_a_sweep(tmp_path):
    """Mamba-2's layers, two seeds, a checkpoint and a saved model."""
    chosen = plan(("mamba2",), steps=2)
    entrants = Apart(lambda: peer("mamba2", 10, 16, 1, d_state=8, headdim=16), [0, 1])
    before = entrants.weights.clone()
    ours = Sweep(chosen, entrants, tmp_path, CPU, say=lambda text: None)
    results = ours.run()
    assert results is not None and json.loads((tmp_path / "results.json").read_text()) == results
    assert not before[0].equal(before[1]) and ours.training.losses.isfinite().all()
    assert not ours.training.weights.equal(before) and (tmp_path / "best-mamba2" / "model.safetensors").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mamba3", "transformer"])
def test_a_captured_graph_takes_the_cpus_steps(tmp_path, kind):
    chosen = replace(plan((kind,)), precision="highest")
    here, _ = run(chosen, tmp_path / "cpu")
    there = Sweep(chosen, models(chosen), tmp_path / "cuda", torch.device("cuda"), say=lambda text: None)
    assert there.run() is not None
    torch.testing.assert_close(there.training.losses.cpu(), here.training.losses, rtol=1e-3, atol=1e-4)
