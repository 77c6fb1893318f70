"""Parity: is the number of ones among random bits odd?

tokens: padding 0, bit 0 is 1, bit 1 is 2;   sequence = s - 1 fair bits, then (ones mod 2) + 1;   s ~ U{shortest ... longest}

Source: automl/unlocking_state_tracking, the generator that arXiv 2603.15569 says it follows.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from mamba3.tasks.base import Batch, Task, asked_at_end, uniform


class Parity(Task):
    """Bits and their parity; see the module."""

    name = "parity"
    vocab_size = 3
    chance = 0.5
    symbols = ("", "0", "1")

    def _sample(self, sequences: int, shortest: int, longest: int, generator: Generator) -> Batch:
        lengths = uniform(shortest, longest, (sequences,), generator)
        bits = uniform(0, 1, (sequences, longest), generator)
        before = torch.arange(longest) < (lengths - 1).unsqueeze(1)
        answers = (bits * before).sum(1, keepdim=True) % 2 + 1
        tokens = torch.where(before, bits + 1, 0).scatter(1, (lengths - 1).unsqueeze(1), answers)
        return asked_at_end(tokens, lengths, longest)

    def encode(self, bits: str) -> Tensor:
        """The tokens [t] of a text of zeros and ones. ValueError for anything else."""
        wrong = sorted(set(bits) - {"0", "1"})
        if wrong or not bits:
            what = f"also {', '.join(map(repr, wrong))}" if wrong else "nothing"
            raise ValueError(f"parity reads a text of 0 and 1, at least one; this one has {what}.")
        return torch.tensor([int(bit) + 1 for bit in bits])
