"""A training step's forward and backward pass as one CUDA graph, where the host would take longer than the GPU.

Rows of fixed shape alone: a pack's tables are built from the values of its bounds, and a carried state differs in what it
resets. What decides about a step (`Watch`), clipping and AdamW stay outside the graph. Law: losses, gradients and skipped steps
are those of the pass that is not captured.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamba3.nn.cuda_graph import record
from mamba3.train.config import TrainConfig
from mamba3.train.packing import Batch
from mamba3.train.ranks import Ranks

TOLERANCE = 1e-2  # of loss and gradient norm against a pass that is not captured; kernels of others sum in any order


class NotCaptured(RuntimeError):
    """The pass is no graph here; the parameters have no gradient."""


def why_not(config: TrainConfig, device: torch.device, ranks: Ranks) -> str | None:
    """Why a configuration's passes cannot be captured; None where it is to be tried."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and the model is on {device}"
    if config.layout != "rows":
        return f"layout is {config.layout!r}, whose tables differ from step to step; only 'rows' have a fixed shape"
    if ranks.size > 1:
        return f"{ranks.size} ranks sum their gradients during the pass"
    return None


class CapturedPass:
    """Forward and backward of batches like `batch`; a call adds its part, one of `passes`, of the mean loss's gradient.

    Raises NotCaptured where it cannot be recorded, or where it is recorded and gives another loss or gradient.
    """

    def __init__(self, objective: nn.Module, batch: Batch, passes: int, device: torch.device):
        self._objective, self._passes = objective, passes
        self._batch = batch._replace(
            inputs=batch.inputs.to(device, copy=True), targets=batch.targets.to(device, copy=True)
        )
        self._loss = torch.zeros((), device=device)
        self._parameters = [p for p in objective.parameters() if p.requires_grad]
        for parameter in self._parameters:
            parameter.grad = None  # one that the loss does not reach has none afterwards either
        try:
            self._replay = record(self._run, self._run, device)
            self._check()
        except RuntimeError as error:
            for parameter in self._parameters:
                parameter.grad = None
            raise NotCaptured(str(error).strip().split("\n")[0]) from error

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        assert batch.inputs.shape == self._batch.inputs.shape
        self._batch.inputs.copy_(batch.inputs, non_blocking=True)
        self._batch.targets.copy_(batch.targets, non_blocking=True)
        self._replay()
        return self._loss.clone()

    def clear(self) -> None:
        """The gradients are zero, where they are."""
        torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])  # pyright: ignore[reportPrivateImportUsage]

    def _run(self) -> None:
        loss, _ = self._objective(self._batch)
        (loss / self._passes).backward()
        self._loss.copy_(loss.detach())

    def _check(self) -> None:
        found = []
        for run in (self._run, self._replay):
            self.clear()
            self._loss.fill_(torch.nan)
            run()
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            found.append(torch.stack([self._loss.double(), norm.double()]).cpu())
        self.clear()
        plain, replayed = found
        if plain.isfinite().all() and not torch.allclose(plain, replayed, rtol=TOLERANCE, atol=0):
            raise RuntimeError(f"as a graph its loss and gradient norm are {replayed.tolist()}, not {plain.tolist()}")
