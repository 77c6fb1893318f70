"""The loss of a batch as one module: what is sharded, replicated and called by the loop and by validation.

Three kinds of batch: independent sequences (packed or rows), rows that go on from the state of the step before, and one
rank's part of a sequence that is spread over ranks.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.lm.state import LMState
from mamba3.train.context import Exchange
from mamba3.train.packing import Batch
from mamba3.train.ranks import Ranks


class Objective(nn.Module):
    """Cross-entropy in float32; `dtype` below float32 runs the model under autocast."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, ranks: Ranks | None = None):
        super().__init__()
        self.model, self.dtype, self.ranks = model, dtype, ranks or Ranks()

    def forward(
        self, batch: Batch, state: LMState | None = None, reduction: str = "mean"
    ) -> tuple[Tensor, LMState | None]:
        """The loss, and what the next batch of rows goes on from (None for other batches)."""
        batch = batch.described_on_cpu()
        plain = self.dtype in (torch.float32, torch.float64)
        with nullcontext() if plain else torch.autocast(batch.inputs.device.type, dtype=self.dtype):
            logits, state = self._logits(batch, state)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets, reduction=reduction), state

    def _logits(self, batch: Batch, state: LMState | None) -> tuple[Tensor, LMState | None]:
        if batch.rows is not None:
            return self._go_on(batch, state)
        if batch.parts is not None:
            exchange = Exchange(self.ranks.sequence, *batch.parts)
            return self.model.forward_segment(batch.inputs, exchange, batch.cu_seqlens), None  # pyright: ignore
        if batch.cu_seqlens is None:
            return self.model(batch.inputs), None
        return self.model(batch.inputs, cu_seqlens=batch.cu_seqlens), None

    def _go_on(self, batch: Batch, state: LMState | None) -> tuple[Tensor, LMState]:
        assert batch.rows is not None and batch.goes_on is not None and batch.cu_seqlens is not None
        pieces, rows = len(batch.cu_seqlens) - 1, len(batch.rows)
        zero = [block.mixer.init_state(1) for block in self.model.layers]  # pyright: ignore
        if state is None:
            joined, source = zero, torch.zeros(pieces, dtype=torch.long)
        else:  # the rows' states and, behind them, the zero state
            joined = [type(z)(*_join(s, z)) for s, z in zip(state.layers, zero, strict=True)]
            source = torch.full((pieces,), rows)
            source[batch.rows[batch.goes_on]] = torch.arange(rows)[batch.goes_on]
        source = source.to(batch.inputs.device)
        entering = LMState([layer.select(source) for layer in joined], torch.zeros_like(source))
        logits, after = self.model.prefill(batch.inputs, entering, batch.cu_seqlens)  # pyright: ignore
        last = torch.cat([batch.rows[1:], torch.tensor([pieces])]) - 1
        return logits, after.select(last).detach()


def _join(state, zero) -> list[Tensor | None]:
    pairs = zip(state, zero, strict=True)
    return [None if a is None or z is None else torch.cat([a, z.to(a.dtype)]) for a, z in pairs]


def batch_loss(model: nn.Module, batch: Batch, dtype: torch.dtype, reduction: str = "mean") -> Tensor:
    """The loss of one batch of independent sequences."""
    return Objective(model, dtype)(batch, reduction=reduction)[0]
