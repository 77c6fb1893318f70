"""Tokens that were read and may be taken back (`Mamba3LM.verify`).

Law: verify, then accept(counts), is prefill of the first counts[i] tokens of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mamba3.lm.state import LMState

if TYPE_CHECKING:
    from mamba3.lm.model import Mamba3LM


@dataclass(frozen=True)
class Draft:
    """Tokens that `Mamba3LM.verify` read: the factors of each, from which the state after any number of them follows."""

    model: Mamba3LM
    state: LMState
    reads: list[Any]

    def accept(self, counts: Sequence[int]) -> LMState:
        """The state, moved on in place by the first counts[i] tokens of each row i; the others were never read."""
        groups: dict[int, list[int]] = {}
        for row, count in enumerate(counts):
            groups.setdefault(count, []).append(row)
        groups.pop(0, None)
        for block, read, layer in zip(self.model._blocks(), self.reads, self.state.layers, strict=True):
            for count, rows in groups.items():
                block.mixer.accept(read, layer, rows, count)
        self.state.tokens += torch.tensor(counts, device=self.state.tokens.device)
        return self.state
