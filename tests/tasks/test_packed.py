"""Laws of training on sequences that lie one behind another: the padded models' logits, gradients and steps."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mamba3.tasks import folded, make_task, widened
from mamba3.tasks.captured import Captured
from mamba3.tasks.entrants import Folded
from mamba3.tasks.models import model_config
from mamba3.tasks.plan import Member, Plan, stage_groups
from mamba3.tasks.settings import Settings

KINDS = ("mamba3", "mamba3-rope", "mamba3-norotation", "mamba3-euler", "mamba3-heavytail")
ROUNDING = 2e-6  # of the largest entry; the padded models in float32 reach 6e-7 here
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = Settings(stages=(12,), steps=3, batch=4, ranges=((16, 16),))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Without a device the kernels run in Triton's interpreter; products in full float32."""
    pytest.importorskip("triton")
    if HERE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def in_one_row(batch, spare):
    """The sequences of a batch one behind another, then `spare` tokens in two that nobody asks and an empty one."""
    lengths = [int(p) + 1 for p in batch.positions[:, 0]]
    rows = [tokens[:length] for tokens, length in zip(batch.inputs, lengths, strict=True)]
    tokens = torch.cat([*rows, torch.zeros(spare, dtype=torch.int64)])
    return tokens, torch.tensor([*lengths, spare - 1, 1, 0]).cumsum(0) - 1, max(lengths)


# One layer: read at the ends alone. More: every token. 75 tokens: more than a tile of the matrices.
@pytest.mark.parametrize(
    ("layers", "headdim", "fraction", "lengths"), [(1, 16, 0.5, (3, 40)), (2, 8, 1.0, (3, 9)), (2, 16, 0.5, (75, 80))]
)
def test_packed_is_folded(layers, headdim, fraction, lengths):
    from mamba3.tasks import packed

    task = make_task("arithmetic-brackets")
    sizes = {"d_model": 16, "d_state": 8, "headdim": headdim, "rope_fraction": fraction, "layers": layers}
    kinds = KINDS if layers == 1 else KINDS[:2]
    configs = [model_config(task.name, task.vocab_size, kind, **sizes) for kind in kinds]
    entrants = Folded(configs, [0] * len(kinds))
    batch = task.sample(3, *lengths, torch.Generator().manual_seed(1)).to(HERE)
    tokens, ends, most = in_one_row(batch, 5)
    start = entrants.weights + 0.1 * torch.randn(entrants.weights.shape)
    found = []
    for dtype in (torch.float64, torch.float32):
        weights = start.to(HERE, dtype).requires_grad_()
        which, named = widened.switches(configs, HERE, dtype), entrants.layout.split(weights)
        if dtype == torch.float64:
            logits = folded.answer_logits(entrants.sizes, which, named, batch.inputs, batch.positions[:, 0])
        else:
            answers = packed.answer_logits(entrants.sizes, which, named, tokens.to(HERE), ends.to(HERE), most)
            assert answers.shape[1] == 6
            logits = answers[:, :3]
        seed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(HERE, dtype)
        (gradient,) = torch.autograd.grad((logits * seed).sum(), weights)
        found.append((logits, entrants.layout.split(gradient)))
    (expected, of_expected), (mine, of_mine) = found
    assert (mine.double() - expected).abs().max() <= ROUNDING * expected.abs().max()
    largest = max(v.abs().max() for v in of_expected.values())
    for name, theirs in of_expected.items():
        assert (of_mine[name].double() - theirs).abs().max() <= ROUNDING * largest, name


def plan(**changes):
    members = (Member("mamba3", 1e-3, 0), Member("mamba3", 3e-3, 1))
    return Plan("arithmetic", 16, members, replace(SETTINGS, **changes), (2,), (2,), headdim=16)


def test_a_row_holds_each_sequence_once():
    chosen = plan(stages=(21,), batch=16, steps=5)
    (row,), groups = stage_groups(chosen, 0, None, packed=True), stage_groups(chosen, 0, None)
    assert row.tokens.shape[1] % 256 == 0 and row.longest == 20  # of 21 tokens the answer is not read
    for step in range(5):
        starts = [0, *(row.positions[step] + 1).tolist()]
        assert starts == sorted(starts) and starts[-1] == row.tokens.shape[1]
        assert max(b - a for a, b in pairwise(starts)) <= row.longest
        mine = [row.tokens[step, a:b].tolist() for a, b in pairwise(starts[:17])]
        theirs = [
            (t[: p + 1].tolist(), int(a))
            for g in groups
            for t, p, a in zip(g.tokens[step], g.positions[step], g.answers[step], strict=True)
        ]
        assert list(zip(mine, row.answers[step].tolist(), strict=True)) == theirs


def test_training_by_kernels_takes_the_same_steps(monkeypatch):
    """Weights, Adam's averages and losses after three steps, one of the models lost at the first."""
    monkeypatch.setattr("mamba3.tasks.plan.ROW_MULTIPLE", 16)  # the interpreter is slow
    chosen = plan()
    config = model_config("arithmetic", 10, "mamba3", d_model=16, layers=2, d_state=8, headdim=16)
    found = []
    for kernels in (False, True):
        entrants = Folded([config] * 2, [0, 1], kernels=kernels)
        rows = torch.cat([entrants.weights, entrants.weights[:1]])
        rows[2, -1] = torch.nan
        training = Captured(
            entrants.layout, rows, torch.ones_like(rows), [1e-3, 3e-3, 1e-3], chosen.settings, HERE, kernels=kernels
        )
        forward = entrants.forward([0, 1, 0], HERE)
        training.start_stage(forward, stage_groups(chosen, 0, None, packed=entrants.packed), 0)
        training.advance(3)
        found.append(training)
    theirs, mine = found
    assert mine.alive.tolist() == theirs.alive.tolist() == [True, True, False] and int(mine.count) == 3
    assert mine.weights[2, :-1].equal(rows[2, :-1].to(HERE))
    torch.testing.assert_close(mine.losses[:, :2], theirs.losses[:, :2], rtol=1e-5, atol=1e-6)
    for name in ("first", "second"):
        torch.testing.assert_close(getattr(mine, name)[:2], getattr(theirs, name)[:2], rtol=1e-3, atol=1e-6)
    # Adam divides by the gradient's size: where that is rounding error, so is the direction of the first steps.
    torch.testing.assert_close(mine.weights[:2], theirs.weights[:2], rtol=1e-3, atol=1e-4)
