"""What a trained parity model does: the angle of its state, token by token.

S_t is kept in the frame that phi_t turns (mathematics.md, section 2): a pair of channels that turns by pi on a one and by 0
on a zero holds the parity as a sign. Which pair does is measured: the one with the largest turn score,
(mean cos of the turn on zeros - mean cos of the turn on ones) / 2, which is 1 for exactly that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.ops.rotate import wrap
from mamba3.ops.types import State

SHIPPED = Path(__file__).parent / "parity.safetensors"


@dataclass(frozen=True)
class Pair:
    """One pair of state channels: where it is, its turn score, and its mean turn (radians) on zeros and on ones."""

    layer: int
    head: int
    pair: int
    score: float
    on_zero: float
    on_one: float


@dataclass(frozen=True)
class Trace:
    """A model reading one sequence: probabilities [t, v] after each token; phases [t, h, a] (radians) of each layer that
    turns, by its index."""

    probabilities: Tensor
    phases: dict[int, Tensor]


def shipped_parity() -> Mamba3LM:
    """The parity model that comes with the package; docs/results/state-tracking.md has the command that trained it."""
    config = Mamba3Config.from_json(SHIPPED.with_suffix(".json").read_text())
    return Mamba3LM.from_weights(config, load_file(SHIPPED), source=str(SHIPPED)).eval()


@torch.no_grad()
def trace(model: Mamba3LM, tokens: Tensor) -> Trace:
    """Read tokens [t] one at a time."""
    state, probabilities = model.init_state(1), []
    phases: dict[int, list[Tensor]] = {}
    for token in tokens:
        logits, state = model.step(token.view(1).to(state.tokens.device), state)
        probabilities.append(logits[0, : model.config.vocab_size].float().softmax(-1).cpu())
        for i, layer in enumerate(state.layers):
            if isinstance(layer, State) and layer.phi.shape[-1]:
                phases.setdefault(i, []).append(layer.phi[0].cpu().clone())
    return Trace(torch.stack(probabilities), {i: torch.stack(v) for i, v in phases.items()})


def turning_pair(seen: Trace, ones: Tensor) -> Pair | None:
    """The pair that follows parity best, given which tokens [t] were ones; None where nothing turns or a kind is missing."""
    if not seen.phases or ones.all() or not ones.any():
        return None
    found = []
    for layer, phases in seen.phases.items():
        turns = wrap(phases.diff(dim=0, prepend=torch.zeros_like(phases[:1])))
        zero, one = turns[~ones], turns[ones]
        score = (zero.cos().mean(0) - one.cos().mean(0)) / 2
        head, pair = divmod(int(score.argmax()), score.shape[1])
        means = (_mean_angle(v[:, head, pair]) for v in (zero, one))
        found.append(Pair(layer, head, pair, float(score[head, pair]), *means))
    return max(found, key=lambda pair: pair.score)


@torch.no_grad()
def turns_by_token(model: Mamba3LM, tokens: Tensor, kinds: Tensor | None = None) -> dict[int, tuple[Tensor, Tensor]]:
    """How far each kind of token turns the state, over the sequences [b, t]: of each layer that turns (mean, agreement), both
    [kinds, h, a]: the circular mean in radians, and the length of the mean unit vector, 1 where all of a kind turn alike.

    kinds [b, t]: of each token, from 0 on; the token itself when None. NaN for kinds that are not there.
    """
    kinds, count = (tokens, model.config.vocab_size) if kinds is None else (kinds, int(kinds.max()) + 1)
    state = model.init_state(len(tokens))
    before, turned = {}, {}
    for column in tokens.T:
        _, state = model.step(column, state)
        for i, layer in enumerate(state.layers):
            if isinstance(layer, State) and layer.phi.shape[-1]:
                phi = layer.phi.clone()
                turned.setdefault(i, []).append(phi - before.get(i, torch.zeros_like(phi)))
                before[i] = phi
    found = {}
    for i, turns in turned.items():
        each = torch.polar(torch.ones(()), torch.stack(turns, dim=1).float())  # [b, t, h, a]
        means = torch.stack([each[kinds == kind].mean(0) for kind in range(count)])
        found[i] = means.angle().where(means.abs().isfinite(), torch.nan), means.abs()
    return found


def _mean_angle(angles: Tensor) -> float:
    return float(torch.atan2(angles.sin().mean(), angles.cos().mean()))
