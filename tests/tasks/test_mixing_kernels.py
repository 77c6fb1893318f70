"""The law of the mixing kernels: results and gradients of `mixing.mix` in float64, to float32's rounding."""

import pytest
import torch

from mamba3.tasks import make_task, mixing, widened
from mamba3.tasks.entrants import Folded
from mamba3.tasks.models import model_config

KINDS = ("mamba3", "mamba3-rope", "mamba3-norotation", "mamba3-euler", "mamba3-heavytail")
WEIGHTS = ("dt_bias", "B_bias", "C_bias", "D")
ROUNDING = 2e-6  # of the largest entry; float32's `mix` reaches 1.4e-6 here
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Without a device the kernels run in Triton's interpreter."""
    pytest.importorskip("triton")
    if HERE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def both(mixer, stack, layer, rows, dtype, seed):
    """What a mixer makes of rows, and its gradients, in a dtype."""
    entrants, sizes = stack
    which = widened.switches(entrants.configs, HERE, dtype)
    rows = mixing.Rows(*(v.to(HERE, dtype).requires_grad_() for v in rows))
    layer = {name: v.to(HERE, dtype).requires_grad_() for name, v in layer.items()}
    y = mixer(sizes, which, layer, rows, 1)
    asked = [*rows, *(layer[f"mixer.{name}"] for name in WEIGHTS)]
    return y, *torch.autograd.grad((y * seed.to(HERE, dtype)).sum(), asked)


@pytest.mark.parametrize(("fraction", "tokens"), [(0.5, 5), (1.0, 32), (0.5, 70)])
def test_kernels_mix_as_pytorch_does(fraction, tokens):
    """All switches in one stack, part of a chunk to several, half or all of the channels turning."""
    configs = [
        model_config("parity", 3, kind, d_model=16, layers=1, d_state=8, headdim=16, rope_fraction=fraction)
        for kind in KINDS
    ]
    entrants = Folded(configs, [0] * len(KINDS))
    own, sizes = "layers.0.", entrants.sizes
    layer = {
        name.removeprefix(own): v + 0.1 * torch.randn(v.shape)
        for name, v in entrants.layout.split(entrants.weights).items()
        if name.startswith(own)
    }
    widths = (sizes.heads * sizes.p,) * 2 + (sizes.n,) * 2 + (3 * sizes.heads + sizes.pairs,)
    rows = mixing.Rows(*(torch.randn(len(KINDS), 1, tokens, width) for width in widths))
    seed = torch.randn(len(KINDS), 1, tokens, sizes.heads * sizes.p)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    expected = both(mixing.mix, (entrants, sizes), layer, rows, torch.float64, seed)
    found = both(mixing.mix_by_kernels, (entrants, sizes), layer, rows, torch.float32, seed)
    torch.set_float32_matmul_precision(before)
    for name, mine, theirs in zip(("y", *rows._fields, *WEIGHTS), found, expected, strict=True):
        error = (mine.double() - theirs).abs().max()
        assert error <= ROUNDING * theirs.abs().max(), (name, float(error), float(theirs.abs().max()))


@pytest.mark.parametrize("layers", [1, 2])
def test_models_by_kernels_are_the_models(layers):
    """The last layer worked out everywhere and read at one token; logits and gradients."""
    task = make_task("arithmetic-brackets")
    batch = task.sample(2, 3, 40, torch.Generator().manual_seed(1)).to(HERE)
    config = model_config(task.name, task.vocab_size, "mamba3", d_model=16, layers=layers, d_state=8, headdim=16)
    found = []
    for kernels in (False, True):
        entrants = Folded([config] * 2, [0, 1], kernels=kernels)
        weights = entrants.weights.to(HERE).requires_grad_()
        logits = entrants.forward([0, 1], HERE)(weights, batch.inputs, batch.positions[:, 0])
        seed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(HERE)
        found.append((logits, *torch.autograd.grad((logits * seed).sum(), weights)))
    for theirs, mine in zip(*found, strict=True):
        assert (mine - theirs).abs().max() <= ROUNDING * theirs.abs().max()
