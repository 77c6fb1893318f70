"""Multi-query associative recall: K pairs of key and value, then each key once more, to be answered with its value.

k1 v1 k2 v2 ... kK vK | slots of two tokens; the i-th key asks again at token 2 K + 2 gap_i, gaps distinct, p(gap j) ~ j^(a - 1)

Keys come from {1 ... V/2 - 1}, values from {V/2 ... V - 1}, neither twice in a sequence; what is left of the input is uniform
noise over all V tokens if `noise`, else 0. The value is the target at the very token that asks, so nothing is shifted.

Source: HazyResearch/zoology, multiquery_ar.py. Accuracy is the mean over a sequence's queries, then over sequences, which
with K queries in each is the mean over all.
"""

from __future__ import annotations

import torch
from torch import Generator

from mamba3.tasks.base import Batch, Task, uniform


class MQAR(Task):
    """Associative recall; see the module. K is longest // pairs_divisor, and every sequence has `longest` input tokens."""

    name = "mqar"
    shortest = 4
    one_length = True

    def __init__(self, vocab_size: int = 8192, pairs_divisor: int = 4, power: float = 0.01, noise: bool = True):
        if vocab_size < 4 or vocab_size % 2 or pairs_divisor < 4:
            raise ValueError(
                f"mqar needs an even vocabulary of at least 4 tokens and at least 4 tokens a pair (4 K <= T); they are "
                f"{vocab_size} and {pairs_divisor}."
            )
        self.vocab_size, self.pairs_divisor, self.power, self.noise = vocab_size, pairs_divisor, power, noise
        self.chance = 0.0  # zoology prints plain accuracy
        self.symbols = tuple(f" {token}" for token in range(vocab_size))

    def _sample(self, sequences: int, shortest: int, longest: int, generator: Generator) -> Batch:
        half, pairs = self.vocab_size // 2, longest // self.pairs_divisor
        if shortest != longest or longest % 2 or not 1 <= pairs < half:
            raise ValueError(
                f"mqar has sequences of one even length T with 1 <= K = T // {self.pairs_divisor} < {half} pairs; T is to "
                f"be {shortest} to {longest}."
            )
        keys = _without_replacement(torch.ones(half - 1), sequences, pairs, generator) + 1
        values = _without_replacement(torch.ones(half), sequences, pairs, generator) + half
        space = (longest - 2 * pairs) // 2
        odds = torch.arange(1, space + 1, dtype=torch.float32) ** (self.power - 1)
        gaps = _without_replacement(odds, sequences, pairs, generator)
        inputs = torch.zeros(sequences, longest, dtype=torch.int64)
        inputs[:, : 2 * pairs] = torch.stack([keys, values], dim=2).flatten(1)
        positions = 2 * pairs + 2 * gaps
        inputs.scatter_(1, positions, keys)
        if self.noise:
            inputs = torch.where(inputs == 0, uniform(0, self.vocab_size - 1, inputs.shape, generator), inputs)
        return Batch(inputs, positions, values, torch.full((sequences,), longest))


def _without_replacement(odds: torch.Tensor, rows: int, count: int, generator: Generator) -> torch.Tensor:
    """[rows, count] distinct indices drawn one after another with probability proportional to `odds`.

    The smallest of exponential variables with these rates come in that order (Efraimidis and Spirakis).
    """
    waits = torch.empty(rows, len(odds), dtype=torch.float32).exponential_(generator=generator) / odds
    return waits.topk(count, largest=False).indices
