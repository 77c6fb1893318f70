"""What every task is: sequences made on the fly, a few supervised positions in each, and one metric.

scaled accuracy = (accuracy - chance) / (1 - chance),    not clipped: guessing scores 0, and a little below as often

Source: arXiv 2603.15569, Table 5b, which follows Grazzi et al. 2025 (table 5): one answer a sequence, micro accuracy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

IGNORED = -1


@dataclass(frozen=True)
class Batch:
    """Sequences of one width, the shorter ones padded behind.

    inputs [b, t]: what the model reads. positions [b, q]: where it is asked, in the input. answers [b, q]: the token
    that the logits at that position must name. lengths [b]: tokens of each sequence, its answer included.
    """

    inputs: Tensor
    positions: Tensor
    answers: Tensor
    lengths: Tensor

    @property
    def targets(self) -> Tensor:
        """[b, t]: the answer at each position asked, IGNORED elsewhere."""
        return torch.full_like(self.inputs, IGNORED).scatter(1, self.positions, self.answers)

    def to(self, device: torch.device | str) -> Batch:
        """The same sequences on another device."""
        return Batch(*(v.to(device) for v in (self.inputs, self.positions, self.answers, self.lengths)))

    def rows(self, start: int, stop: int) -> Batch:
        """Sequences start to stop - 1."""
        return Batch(*(v[start:stop] for v in (self.inputs, self.positions, self.answers, self.lengths)))


class Task(ABC):
    """A generator of sequences with answers.

    name: of the task on the command line. vocab_size: its tokens are 0 ... vocab_size - 1. chance: accuracy of guessing.
    symbols: the text of each token. shortest: tokens of the shortest sequence.
    one_length: whether the sequences of a batch must all have the same length.
    """

    name: ClassVar[str]
    vocab_size: int
    chance: float
    symbols: tuple[str, ...]
    shortest: ClassVar[int] = 3
    one_length: ClassVar[bool] = False

    def sample(self, sequences: int, shortest: int, longest: int, generator: Generator) -> Batch:
        """`sequences` new sequences with lengths from {shortest ... longest}, on the CPU.

        A function of the arguments and of the generator's state alone. ValueError where no such sequence exists.
        """
        if sequences < 1 or not self.shortest <= shortest <= longest:
            raise ValueError(
                f"{self.name} needs at least one sequence and {self.shortest} <= shortest <= longest; they are "
                f"{sequences}, {shortest} and {longest}."
            )
        return self._sample(sequences, shortest, longest, generator)

    @abstractmethod
    def _sample(self, sequences: int, shortest: int, longest: int, generator: Generator) -> Batch: ...

    def text(self, tokens: Tensor | list[int]) -> str:
        """One sequence as its symbols; padding prints as nothing."""
        return "".join(self.symbols[int(token)] for token in tokens)

    def scaled_accuracy(self, accuracy: float) -> float:
        """0 for guessing, 1 for no error."""
        return (accuracy - self.chance) / (1 - self.chance)


def uniform(low: int, high: int, size: tuple[int, ...], generator: Generator) -> Tensor:
    """Integers from {low ... high}, both ends included."""
    return torch.randint(low, high + 1, size, generator=generator)


def asked_at_end(sequences: Tensor, lengths: Tensor, width: int) -> Batch:
    """A batch whose one answer is token `lengths - 1` of each row of `sequences` [b, at least width].

    The input is all but the last of `width` tokens with the answer's place set to 0; the logits are read one before it.
    """
    places = (lengths - 1).unsqueeze(1)
    answers = sequences.gather(1, places)
    inputs = sequences[:, :width].scatter(1, places, 0)[:, : width - 1]
    return Batch(inputs.contiguous(), places - 1, answers, lengths)
