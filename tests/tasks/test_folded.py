"""The law of folded models: the logits and gradients of models mapped over a stack, for every setting, rank and length."""

from dataclasses import replace

import pytest
import torch

from mamba3.tasks import folded, make_task, widened
from mamba3.tasks.captured import Layout
from mamba3.tasks.entrants import Folded
from mamba3.tasks.models import KINDS, model_config
from mamba3.tasks.settings import Settings
from mamba3.tasks.stack import Stack

TASK = make_task("arithmetic-brackets")
SWITCHED = tuple(kind for kind in KINDS if kind not in ("transformer", "mamba3-mimo", "mamba3-allturn"))


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(kind, layers):
    return model_config(TASK.name, TASK.vocab_size, kind, d_model=16, layers=layers, d_state=8, headdim=16)


def sequences(count, longest):
    return TASK.sample(count, 3, longest, torch.Generator().manual_seed(1))


def both(kind, layers, batch):
    """Logits at the asked tokens from a vmapped stack and from the folded one with the same weights; their gradients too."""
    config = small(kind, layers)
    stack, entrants = Stack(config, (0, 1), Settings(rates=(1e-3, 2e-3)), "cpu"), Folded([config] * 2, [0, 1])
    weights = entrants.weights.clone().requires_grad_()
    ours = entrants.forward([0, 1], torch.device("cpu"))(weights, batch.inputs, batch.positions[:, 0])
    theirs = torch.vmap(stack._logits, in_dims=(0, 0, None, None))(
        stack.parameters, stack.buffers, batch.inputs, batch.positions
    )[:, :, 0]
    seed = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((ours * seed).sum(), weights)
    expected = torch.autograd.grad((theirs * seed).sum(), list(stack.parameters.values()))
    named = entrants.layout.split(gradient)
    gradients = [widened.narrowed(config, {k: v[i] for k, v in named.items()}) for i in range(2)]
    pairs = [
        (torch.stack([g[name.removeprefix("model.")] for g in gradients]), value)
        for name, value in zip(stack.parameters, expected, strict=True)
    ]
    return ours, theirs, pairs


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "transformer"])
def test_folded_is_mapped(kind, layers):
    ours, theirs, gradients = both(kind, layers, sequences(4, 20))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for mine, expected in gradients:
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["mamba3", "mamba3-mimo"])
def test_folded_is_mapped_over_several_chunks(kind):
    batch = sequences(3, 300)
    assert folded.in_chunks(batch.inputs, 4 if kind == "mamba3-mimo" else 1)[1] > 1
    ours, theirs, gradients = both(kind, 2, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for mine, expected in gradients:
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-11)


def test_kinds_share_a_stack():
    """All that are switches of one equation at once, each as it is alone."""
    batch, configs = sequences(4, 20), [small(kind, 2) for kind in SWITCHED]
    together = Folded(configs, [3] * len(configs))
    logits = together.forward([*range(len(configs))], torch.device("cpu"))(
        together.weights, batch.inputs, batch.positions[:, 0]
    )
    for i, config in enumerate(configs):
        alone = Folded([config], [3])
        own = alone.forward([0], torch.device("cpu"))(alone.weights, batch.inputs, batch.positions[:, 0])
        torch.testing.assert_close(logits[i], own[0], rtol=1e-12, atol=1e-14)
    missing = {kind: int((1 - together.exist[i]).sum()) for i, kind in enumerate(SWITCHED)}
    assert missing["mamba3"] == missing["mamba3-heavytail"] == 0
    assert missing["mamba3-rope"] == 2 * 2 * 16 and missing["mamba3-euler"] == 2 * 2 * 16  # two pairs; two heads
    assert missing["mamba3-nobias"] == 2 * 2 * 2 * 8


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "transformer"])
def test_a_saved_model_is_the_one_in_the_stack(kind, tmp_path):
    from mamba3.lm import Mamba3LM

    entrants, batch = Folded([small(kind, 2)], [5]), sequences(3, 12)
    entrants.save(0, {k: v[0] for k, v in entrants.layout.split(entrants.weights).items()}, tmp_path)
    logits = Mamba3LM.from_pretrained(tmp_path)(batch.inputs)[torch.arange(3), batch.positions[:, 0], : TASK.vocab_size]
    ours = entrants.forward([0], torch.device("cpu"))(entrants.weights, batch.inputs, batch.positions[:, 0])
    torch.testing.assert_close(ours[0], logits, rtol=1e-10, atol=1e-12)


def test_a_weight_that_vanishes_makes_no_nan():
    """lam = 0 gives the last token no weight, whose logarithm is taken."""
    config = replace(small("mamba3", 2), lam=0.0)
    entrants, batch = Folded([config], [0]), sequences(3, 12)
    weights = entrants.weights.clone().requires_grad_()
    logits = entrants.forward([0], torch.device("cpu"))(weights, batch.inputs, batch.positions[:, 0])
    (gradient,) = torch.autograd.grad(logits.sum(), weights)
    assert logits.isfinite().all() and gradient.isfinite().all()


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="attention layers, an MLP: use Stack"):
        widened.Sizes.of(model_config("parity", 3, "transformer", d_model=16))
    with pytest.raises(ValueError, match="may differ in rotation, lam"):
        Folded([small("mamba3", 2), small("mamba3-mimo", 2)], [0, 0])


def test_layout_joins_and_splits():
    shapes = {"a": torch.Size([2, 3]), "b.dt_bias": torch.Size([4]), "c.B_bias": torch.Size([2, 1, 2])}
    layout = Layout(shapes)
    rows = torch.arange(2 * layout.size, dtype=torch.float64).view(2, -1)
    assert layout.join(layout.split(rows)).equal(rows) and layout.split(rows)["a"].shape == (2, 2, 3)
    assert layout.decayed(Settings()).tolist() == [1.0] * 6 + [0.0] * 8
    assert layout.decayed(Settings(decay_bc_bias=True)).tolist() == [1.0] * 6 + [0.0] * 4 + [1.0] * 4
