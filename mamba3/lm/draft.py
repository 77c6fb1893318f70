"""Tokens that were read and may be taken back (`Mamba3LM.verify`).

Law: verify, then accept(counts), is prefill of the first counts[i] tokens of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamba3.lm.state import LMState

if TYPE_CHECKING:
    from mamba3.lm.model import Mamba3LM


@dataclass(frozen=True)
class Draft:
    """Tokens that `Mamba3LM.verify` read: the factors of each, from which the state after any number of them follows."""

    model: Mamba3LM
    state: LMState
    reads: list[Any]

    def accept(self, counts: Sequence[int] | Tensor) -> LMState:
        """The state, moved on in place by the first counts[i] tokens of each row i; the others were never read.

        counts: as many as there are rows; as a tensor int64, on the state's device.
        """
        device = self.state.tokens.device
        counts = counts if isinstance(counts, Tensor) else torch.tensor(counts, device=device)
        for block, read, layer in zip(self.model._blocks(), self.reads, self.state.layers, strict=True):
            block.mixer.accept(read, layer, counts)
        self.state.tokens += counts
        return self.state
