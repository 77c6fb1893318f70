"""Arithmetic modulo 5, without and with brackets.

without: digit (op digit)* = answer, op from + - *, and * binds tighter; k ~ U{(min + 1) // 2 ... (max + 1) // 2}, s = 2 k - 1
with:    expression = answer padding,  s = max(U{min ... max}, 5),  the expression has e = s - 3 tokens:
         e = 1: d    2: -d    3: (d)    4: (-d)    else ( L op R ), op from + -, |L| ~ U{1 ... e - 4}, |R| = e - 3 - |L|

Source: automl/unlocking_state_tracking (after neural_networks_chomsky_hierarchy), whose default leaves * out of brackets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mamba3.tasks.base import Batch, Task, asked_at_end, uniform

MODULUS = 5


class ModularArithmetic(Task):
    """Digits and + - *, no brackets; see the module."""

    name = "arithmetic"
    vocab_size = 10
    chance = 1 / MODULUS
    symbols = ("", "+", "-", "*", "=", "0", "1", "2", "3", "4")
    plus, minus, times, equals, zero = 1, 2, 3, 4, 5

    def _sample(self, sequences: int, shortest: int, longest: int, generator: Generator) -> Batch:
        most = (longest + 1) // 2
        halves = uniform((shortest + 1) // 2, most, (sequences,), generator)
        digits = uniform(0, MODULUS - 1, (sequences, most), generator)
        ops = uniform(self.plus, self.times, (sequences, most), generator)
        used = torch.arange(most) < (halves - 1).unsqueeze(1)
        lengths = 2 * halves - 1
        tokens = torch.stack([digits + self.zero, ops], dim=2) * used.unsqueeze(2)
        tokens = tokens.flatten(1).scatter(1, (lengths - 2).unsqueeze(1), self.equals)
        answers = self._value(digits, ops, halves - 1) + self.zero
        tokens = tokens.scatter(1, (lengths - 1).unsqueeze(1), answers.unsqueeze(1))
        return asked_at_end(tokens, lengths, longest)

    def _value(self, digits: Tensor, ops: Tensor, count: Tensor) -> Tensor:
        """Of the first `count` [b] digits [b, k], joined by the operators that follow each: one pass, the term not yet
        added kept apart from the sum."""
        total, term = torch.zeros_like(count), digits[:, 0].clone()
        for i in range(1, digits.shape[1]):
            op, digit, live = ops[:, i - 1], digits[:, i], i < count
            multiplies = op == self.times
            total = torch.where(live & ~multiplies, total + term, total)
            fresh = torch.where(multiplies, term * digit, torch.where(op == self.plus, digit, -digit)) % MODULUS
            term = torch.where(live, fresh, term)
        return (total + term) % MODULUS


@dataclass(frozen=True)
class _Level:
    """Compound expressions of one depth: where their two children lie among the next level's, and which operator."""

    compound: Tensor  # indices into this level's expressions
    minus: Tensor  # [compound]: whether the operator is -
    values: Tensor  # [expressions]: those of the leaves; the compound ones are filled in from below


class BracketArithmetic(Task):
    """Digits, + -, a sign and brackets around every operation; see the module."""

    name = "arithmetic-brackets"
    vocab_size = 12
    chance = 1 / MODULUS
    symbols = ("0", "1", "2", "3", "4", "+", "-", "*", "(", ")", "=", "")
    shortest = 3
    plus, minus, opening, closing, equals, padding = 5, 6, 8, 9, 10, 11

    def _sample(self, sequences: int, shortest: int, longest: int, generator: Generator) -> Batch:
        lengths = uniform(shortest, longest, (sequences,), generator).clamp(min=5)
        width = max(longest, 5)
        # One column more: where an expression has no such token, it is written there.
        tokens = torch.full((sequences, width + 1), self.padding)
        rows, sizes = torch.arange(sequences), lengths - 3
        values = self._write(tokens, rows, torch.zeros_like(rows), sizes, generator)
        tokens[rows, sizes] = self.equals
        tokens[rows, sizes + 1] = values
        # lengths counts the padding token that follows the answer, as the source's does; the answer is one before it.
        return _named(asked_at_end(tokens, lengths - 1, width), lengths)

    def _write(self, tokens: Tensor, rows: Tensor, starts: Tensor, sizes: Tensor, generator: Generator) -> Tensor:
        """Write an expression of `sizes` tokens at each (row, start); their values. All expressions of one depth at once."""
        levels: list[_Level] = []
        while len(rows):
            values = self._write_leaves(tokens, rows, starts, sizes, generator)
            (compound,) = torch.where(sizes > 4)
            row, start, size = rows[compound], starts[compound], sizes[compound]
            left = (torch.rand(len(size), generator=generator, dtype=torch.float64) * (size - 4)).long() + 1
            minus = torch.rand(len(size), generator=generator) < 0.5
            tokens[row, start], tokens[row, start + size - 1] = self.opening, self.closing
            tokens[row, start + left + 1] = torch.where(minus, self.minus, self.plus)
            levels.append(_Level(compound, minus, values))
            rows = row.repeat(2)
            starts, sizes = torch.cat([start + 1, start + left + 2]), torch.cat([left, size - 3 - left])
        children = torch.empty(0, dtype=torch.int64)
        for level in reversed(levels):
            left, right = children.chunk(2) if len(children) else (children, children)
            level.values[level.compound] = (left + torch.where(level.minus, -right, right)) % MODULUS
            children = level.values
        return children

    def _write_leaves(
        self, tokens: Tensor, rows: Tensor, starts: Tensor, sizes: Tensor, generator: Generator
    ) -> Tensor:
        """Write d, -d, (d) and (-d) where an expression has at most four tokens; the values of those."""
        digits = uniform(0, MODULUS - 1, (len(rows),), generator)
        signed, bracketed = (sizes == 2) | (sizes == 4), (sizes == 3) | (sizes == 4)
        outside = tokens.shape[1] - 1

        def put(token: int | Tensor, offset: Tensor | int, where: Tensor) -> None:
            tokens[rows, torch.where(where, starts + offset, outside)] = token

        put(self.opening, 0, bracketed)
        put(self.minus, bracketed.long(), signed)
        put(digits, bracketed.long() + signed.long(), sizes <= 4)
        put(self.closing, sizes - 1, bracketed)
        return torch.where(signed, -digits, digits) % MODULUS


def _named(batch: Batch, lengths: Tensor) -> Batch:
    return Batch(batch.inputs, batch.positions, batch.answers, lengths)
