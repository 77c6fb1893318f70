"""Speculation: cheap guesses of the next tokens, which the model then reads all at once and keeps as far as they are right.

    t_n = argmax(logits_n + noise(seed, n)) is chosen at every place as without speculation; the guess d_n stays if d_n = t_n

The noise depends on the place alone (`engine.noise`), and so the tokens are those of no speculation, greedy or drawn: there is
no acceptance test that would have to preserve a distribution. A draft model that draws with the same noise guesses right
where its distribution is near the model's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from mamba3.engine.sampler import sample
from mamba3.engine.sequence import Sequence
from mamba3.lm import LMState, Mamba3LM


class Proposer(Protocol):
    """Guesses at most `count` tokens that follow everything said in a sequence. A wrong guess costs time alone."""

    def propose(self, sequence: Sequence, count: int) -> list[int]:
        """The guess; it may be empty."""
        ...


class NGramDraft:
    """What followed the last tokens when they came before: the longest of the sizes that is found, its latest place."""

    def __init__(self, sizes: tuple[int, ...] = (4, 3, 2)):
        self.sizes = sizes
        self._known: WeakKeyDictionary[Sequence, _Places] = WeakKeyDictionary()

    def propose(self, sequence: Sequence, count: int) -> list[int]:
        places = self._known.get(sequence)
        if places is None:
            places = self._known[sequence] = _Places(self.sizes, [*sequence.request.history, *sequence.tokens.tolist()])
        places.add(sequence.chosen[len(places.tokens) - places.first :])
        return places.following(count)


class _Places:
    """Where each n-gram of a text ended last, but for the ones that end it now."""

    def __init__(self, sizes: tuple[int, ...], tokens: list[int]):
        self.sizes, self.tokens, self.first = sizes, [], len(tokens)
        self._ends: dict[tuple[int, ...], int] = {}
        self.add(tokens)

    def add(self, tokens: list[int]) -> None:
        for token in tokens:
            for size in self.sizes:
                if len(self.tokens) >= size:
                    self._ends[tuple(self.tokens[-size:])] = len(self.tokens)
            self.tokens.append(token)

    def following(self, count: int) -> list[int]:
        for size in self.sizes:
            end = self._ends.get(tuple(self.tokens[-size:])) if len(self.tokens) >= size else None
            if end is not None:
                return self.tokens[end : end + count]
        return []


class ModelDraft:
    """A smaller model of the same vocabulary, with a state of its own for each sequence."""

    def __init__(self, model: Mamba3LM):
        self.model = model.eval()
        self._known: WeakKeyDictionary[Sequence, LMState] = WeakKeyDictionary()

    @torch.no_grad()
    def propose(self, sequence: Sequence, count: int) -> list[int]:
        state, said = self._known.get(sequence), [*sequence.seen(), sequence.last]
        read = 0 if state is None else int(state.tokens)
        device, vocabulary = self.model.embedding.weight.device, self.model.config.vocab_size
        logits, state = self.model.prefill(torch.tensor([said[read:]], device=device), state, last_only=True)
        self._known[sequence] = state  # it has read what is certain; the guesses are read by a copy
        state, logits, draws = (
            state.clone(),
            logits[:, -1],
            replace(sequence.draws, chosen=Counter(sequence.draws.chosen)),
        )
        guessed: list[int] = []
        while len(guessed) < count:
            token = sample(logits[:, :vocabulary], [draws])[0].token
            draws.note(token)
            guessed.append(token)
            if len(guessed) < count:
                logits, state = self.model.step(torch.tensor([token], device=device), state)
        return guessed
