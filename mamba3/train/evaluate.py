"""Perplexity and bits per byte over held-out documents."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mamba3.train.packing import Batch
from mamba3.train.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums over held-out tokens: `nats` of negative log-likelihood, tokens predicted, UTF-8 bytes they stand for."""

    nats: float
    tokens: int
    bytes: int | None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp overflows above 709

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable across tokenizers; None if the tokens are not pieces of bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


@torch.no_grad()
def evaluate(
    objective: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    sizes: np.ndarray | None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Sum the loss of the batches, which the ranks share. `sizes`: UTF-8 bytes of each token (`tokenizer.token_bytes`).

    Compiled parts run as written: their graphs are for the shape of a training step.
    """
    ranks = ranks or Ranks()
    training = objective.training
    objective.eval()
    batches = list(batches)
    nats = torch.zeros((), dtype=torch.float64)
    with torch.compiler.set_stance("force_eager"):
        for first in range(
            0, len(batches), ranks.size
        ):  # every rank takes part in every round: parameters may be sharded
            mine = first + ranks.rank
            batch = batches[min(mine, len(batches) - 1)].to(device)
            loss = objective(batch, reduction="sum")[0].cpu().double()
            nats += loss if mine < len(batches) else 0.0
    objective.train(training)
    tokens = sum(batch.targets.numel() for batch in batches)
    size = None if sizes is None else int(sum(sizes[batch.targets.numpy()].sum() for batch in batches))
    return Evaluation(nats=ranks.total(nats).item(), tokens=tokens, bytes=size)
