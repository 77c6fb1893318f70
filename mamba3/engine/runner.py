"""The engine's calls of the model: pieces of prompts, and one token of every running sequence.

Prompts: the pieces of a step are one packed batch. Running sequences: one step in place on the rows of the pool. With
`exact` each sequence is called by itself, as the plain loop calls it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamba3.engine.sequence import Sequence
from mamba3.engine.state_pool import StatePool
from mamba3.lm import LMState, Mamba3LM
from mamba3.lm.draft import Draft


class Runner:
    """Logits have the model's true vocabulary: what pads the embedding is cut off."""

    def __init__(self, model: Mamba3LM, *, exact: bool):
        self.model, self.exact = model, exact
        self._vocabulary = model.config.vocab_size
        self._device = model.embedding.weight.device

    @torch.no_grad()
    def read(self, pieces: list[tuple[Sequence, int]]) -> list[Tensor]:
        """Read the next tokens of prompts: the sequences' states and positions move on.

        Logits [1, v] after each piece, or [piece, v] for a sequence that wants log probabilities of its prompt.
        """
        alone = self.exact or len(pieces) == 1
        return [self._read_one(*piece) for piece in pieces] if alone else self._read_packed(pieces)

    @torch.no_grad()
    def step(self, sequences: list[Sequence], pool: StatePool) -> Tensor:
        """Read the last token of each running sequence, row i being sequences[i]: logits [n, v]."""
        tokens = torch.tensor([s.last for s in sequences], device=self._device)
        rows = range(len(sequences))
        spans = [(i, i + 1) for i in rows] if self.exact else [(0, len(sequences))]
        logits = [self.model.step(tokens[a:b], pool.view(b, a, room=1))[0] for a, b in spans]
        for row in rows:
            pool.advance(row, 1)
        return torch.cat(logits)[:, : self._vocabulary]

    @torch.no_grad()
    def verify(self, sequences: list[Sequence], guesses: list[list[int]], pool: StatePool) -> tuple[Tensor, Draft]:
        """Read the last token of each running sequence and a guess of what follows: logits [n, t, v], and what takes
        back the tokens that were wrong. Shorter guesses are filled up, with what nobody looks at."""
        longest = max(map(len, guesses))
        rows = [[s.last, *g, *[0] * (longest - len(g))] for s, g in zip(sequences, guesses, strict=True)]
        state = pool.view(len(sequences), room=longest + 1)
        logits, draft = self.model.verify(torch.tensor(rows, device=self._device), state)
        return logits[..., : self._vocabulary], draft

    def _read_one(self, sequence: Sequence, count: int) -> Tensor:
        ids = self._ids(sequence, count)[None]
        last_only = not sequence.wants_prompt_logprobs
        logits, after = self.model.prefill(ids, self._state(sequence), last_only=last_only)
        self._move(sequence, count, after)
        return logits[0, :, : self._vocabulary]

    def _read_packed(self, pieces: list[tuple[Sequence, int]]) -> list[Tensor]:
        counts = [count for _, count in pieces]
        bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
        ids = torch.cat([self._ids(*piece) for piece in pieces])[None]
        state = LMState.cat([self._state(sequence) for sequence, _ in pieces])
        lengths = state.tokens.tolist()  # a pack's caches have room for its longest, which the others do not keep
        last_only = not any(sequence.wants_prompt_logprobs for sequence, _ in pieces)
        logits, after = self.model.prefill(ids, state, bounds, last_only=last_only)
        logits = logits[..., : self._vocabulary]
        found = []
        for i, (sequence, count) in enumerate(pieces):
            self._move(sequence, count, after.select([i]).trim(lengths[i] + count))
            every = logits[i] if last_only else logits[0, bounds[i] : bounds[i + 1]]
            found.append(every if sequence.wants_prompt_logprobs else every[-1:])
        return found

    def _ids(self, sequence: Sequence, count: int) -> Tensor:
        return torch.from_numpy(sequence.tokens[sequence.read : sequence.read + count]).to(self._device)

    def _state(self, sequence: Sequence) -> LMState:
        return self.model.init_state(1) if sequence.state is None else sequence.state.to(self._device)

    def _move(self, sequence: Sequence, count: int, state: LMState) -> None:
        sequence.read += count
        sequence.state = state
