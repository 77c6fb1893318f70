"""Which activation of A a checkpoint was trained with, by measurement: its loss on plain English under either."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from importlib import resources
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from mamba3.lm import Mamba3LM
from mamba3.nn import Mamba3
from mamba3.ops.discretize import DECAYS

logger = logging.getLogger(__name__)

# Nats a token. A model that tells the two apart by less has not told them apart.
MARGIN = 0.01


class DecayChoice(NamedTuple):
    """decay: the activation taken. source: who named it. losses: nats a token under each, when it was measured."""

    decay: str
    source: Literal["argument", "config.json", "measured"]
    losses: dict[str, float] | None = None

    @property
    def margin(self) -> float | None:
        """By how many nats a token the activation taken is better than the next, when it was measured."""
        if self.losses is None:
            return None
        return min(loss for name, loss in self.losses.items() if name != self.decay) - self.losses[self.decay]

    def __str__(self) -> str:
        if self.losses is None:
            return f"decay {self.decay}, named by the {self.source}"
        measured = ", ".join(f"{name} {loss:.4f}" for name, loss in sorted(self.losses.items(), key=lambda i: i[1]))
        return f"decay {self.decay}, by {self.margin:.4f} nats a token ({measured})"


def bundled_documents() -> list[str]:
    """The bundled English sentences, joined into a few short documents."""
    text = resources.files("mamba3.convert").joinpath("sentences.txt").read_text(encoding="utf-8")
    return [" ".join(part.split("\n")) for part in text.strip().split("\n\n")]


@torch.no_grad()
def choose_decay(model: Mamba3LM, tokenizer: Tokenizer, documents: Iterable[str] | None = None) -> DecayChoice:
    """The activation of A under which `model` predicts plain text better, with the loss of each.

    documents: texts to predict; the bundled ones when None. The model is left as it was. A difference of less than
    0.01 nats a token is logged as a warning. ValueError when the tokenizer is not the model's, or no loss is finite.
    """
    ids = [tokenizer.encode(text).ids for text in (bundled_documents() if documents is None else documents)]
    ids = [tokens for tokens in ids if len(tokens) > 1]
    if not ids:
        raise ValueError("The documents have no token to predict; the tokenizer or the texts are empty.")
    largest = max(max(tokens) for tokens in ids)
    if largest >= model.config.padded_vocab_size:
        raise ValueError(
            f"The tokenizer is not this model's: it yields token {largest}, and the model has "
            f"{model.config.padded_vocab_size}."
        )
    mixers = [module for module in model.modules() if isinstance(module, Mamba3)]
    before, losses = [mixer.decay for mixer in mixers], {}
    try:
        for decay in DECAYS:
            for mixer in mixers:
                mixer.decay = decay
            losses[decay] = _mean_loss(model, ids)
    finally:
        for mixer, decay in zip(mixers, before, strict=True):
            mixer.decay = decay
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError("The model's loss is not finite under either activation of A; its weights are damaged.")
    choice = DecayChoice(min(finite, key=lambda name: finite[name]), "measured", losses)
    if choice.margin is not None and choice.margin < MARGIN:
        logger.warning("%s: too close to tell; name the decay if you know it", choice)
    else:
        logger.info("%s", choice)
    return choice


def _mean_loss(model: Mamba3LM, documents: list[list[int]]) -> float:
    total, count = 0.0, 0
    for tokens in documents:
        ids = torch.tensor([tokens], device=model.embedding.weight.device)
        logits = model(ids[:, :-1])
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        total += F.cross_entropy(logits[0].to(wide), ids[0, 1:], reduction="sum").item()
        count += len(tokens) - 1
    return total / count
