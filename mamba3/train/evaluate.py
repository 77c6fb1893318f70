"""Loss of a batch, and perplexity and bits per byte over held-out documents."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mamba3.train.packing import Batch


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


def batch_loss(model: nn.Module, batch: Batch, dtype: torch.dtype, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in float32 of the packed batch; `dtype` below float32 runs the model under autocast."""
    device = batch.inputs.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(batch.inputs, cu_seqlens=batch.cu_seqlens)
    return F.cross_entropy(logits[0].float(), batch.targets, reduction=reduction)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, device: torch.device, dtype: torch.dtype, sizes: np.ndarray | None
) -> Evaluation:
    """Sum the loss of the batches. `sizes`: UTF-8 bytes of each token (`tokenizer.token_bytes`)."""
    training = model.training
    model.eval()
    nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        nats += batch_loss(model, batch.to(device), dtype, "sum").item()
        tokens += batch.targets.numel()
        if sizes is not None:
            size += int(sizes[batch.targets.numpy()].sum())
    model.train(training)
    return Evaluation(nats=nats, tokens=tokens, bytes=size if sizes is not None else None)
