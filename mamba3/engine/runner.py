"""The engine's calls of the model: pieces of prompts, and one token of every running sequence.

Prompts: the pieces of a step are one packed batch. Running sequences: one step in place on the rows of the pool, on a GPU a
CUDA graph (`engine.graphs`), and the tokens are chosen behind it where that needs nothing but logits, temperature and noise.
With `exact` each sequence is called by itself, as the plain loop calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mamba3.engine.flight import Flight
from mamba3.engine.graphs import CaptureFailed, DecodeGraphs
from mamba3.engine.pages import Pages
from mamba3.engine.sequence import Sequence
from mamba3.engine.state_pool import StatePool
from mamba3.lm import LMState, Mamba3LM

_log = logging.getLogger(__name__)


class Runner:
    """Logits have the model's true vocabulary: what pads the embedding is cut off."""

    def __init__(self, model: Mamba3LM, *, exact: bool, graphs: DecodeGraphs | None = None, pages: Pages | None = None):
        self.model, self.exact, self.graphs, self._pages = model, exact, graphs, pages
        self.failure: str | None = None  # why there are no graphs any more
        self._vocabulary = model.config.vocab_size
        self._device = model.embedding.weight.device

    @torch.no_grad()
    def read(self, pieces: list[tuple[Sequence, int]]) -> list[Tensor]:
        """Read the next tokens of prompts: the sequences' states and positions move on.

        Logits [1, v] after each piece, or [piece, v] for a sequence that wants log probabilities of its prompt.
        """
        alone = self.exact or len(pieces) == 1
        return [self._read_one(*piece) for piece in pieces] if alone else self._read_packed(pieces)

    def capture(self) -> Iterator[tuple[int, int]]:
        """Capture all graphs: (how many there are, of how many) after each."""
        try:
            yield from self.graphs.capture() if self.graphs is not None else ()
        except CaptureFailed as error:
            self._without_graphs(error)

    def _without_graphs(self, error: CaptureFailed) -> None:
        _log.warning("steps run without CUDA graphs: %s", error)
        self.graphs, self.failure = None, str(error)

    @torch.no_grad()
    def step(self, sequences: list[Sequence], pool: StatePool) -> Flight:
        """Launch the reading of the last token of each running sequence, row i being sequences[i]."""
        tokens, chosen = [s.chosen[-1] for s in sequences], None
        logits = self._replay(tokens)
        if logits is None:
            logits = self._step(torch.tensor(tokens, device=self._device), pool)[:, : self._vocabulary]
        else:
            logits = logits[:, : self._vocabulary]
            chosen = self._choose_behind(sequences, logits)
        pool.advance_all(len(tokens))
        return Flight(sequences, logits, chosen)

    def _choose_behind(self, sequences: list[Sequence], logits: Tensor) -> Callable[[], list[int]] | None:
        """Let the device choose a token for each sequence behind the graph; None where `sample` has to."""
        assert self.graphs is not None
        draws = [s.draws for s in sequences]
        temperature = draws[0].params.temperature
        if not all(d.plain and d.params.temperature == temperature for d in draws):
            return None
        if temperature > 0:
            self.graphs.draw(logits, draws[0].params.filters, [d.key for d in draws])
        return self.graphs.fetch(len(sequences))

    def _step(self, tokens: Tensor, pool: StatePool) -> Tensor:
        if not self.exact:
            return self.model.step(tokens, pool.view(len(tokens), room=1))[0]
        alone = [self.model.step(one, pool.view(i + 1, i, room=1))[0] for i, one in enumerate(tokens.split(1))]
        return torch.cat(alone)

    def _replay(self, tokens: list[int]) -> Tensor | None:
        """The step as a graph; None where there is none."""
        try:
            return None if self.graphs is None else self.graphs.step(tokens)
        except CaptureFailed as error:
            return self._without_graphs(error)

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
        state, lengths = None, [0] * len(pieces)
        if any(sequence.state is not None for sequence, _ in pieces):
            state = LMState.cat([self._state(sequence) for sequence, _ in pieces])
            lengths = state.tokens.tolist()
        last_only = not any(sequence.wants_prompt_logprobs for sequence, _ in pieces)
        logits, after = self.model.prefill(ids, state, bounds, last_only=last_only)
        logits = logits[..., : self._vocabulary]
        found = []
        for i, (sequence, count) in enumerate(pieces):
            # A state that goes into a row next may as well lie in the pack's memory till then; others would keep all of it.
            # A pack's caches have room for its longest, which the others do not keep.
            leaves = count == sequence.unread and sequence.request.params.n == 1
            state = after.row(i) if leaves else after.select([i])
            self._move(sequence, count, state.trim(lengths[i] + count))
            every = logits[i] if last_only else logits[0, bounds[i] : bounds[i + 1]]
            found.append(every if sequence.wants_prompt_logprobs else every[-1:])
        return found

    def _ids(self, sequence: Sequence, count: int) -> Tensor:
        return torch.from_numpy(sequence.tokens[sequence.read : sequence.read + count]).to(self._device)

    def _state(self, sequence: Sequence) -> LMState:
        if sequence.state is None:
            return self.model.init_state(1)
        state = sequence.state if self._pages is None else self._pages.fetch(sequence.state)
        return state.to(self._device)

    def _move(self, sequence: Sequence, count: int, state: LMState) -> None:
        sequence.read += count
        sequence.state = state if self._pages is None else self._pages.store(state, sequence.state)
