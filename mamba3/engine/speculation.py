"""A step with guesses: all that a draft proposes for the running sequences is read at once and kept as far as it is right.

At most `config.speculate` tokens are guessed for a sequence, as many as its `Pace` wants. Where fewer than half of the running
sequences have a guess, nobody guesses: the others would read their filling in vain. Law: tokens are those of no speculation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mamba3.engine.config import EngineConfig
from mamba3.engine.counters import Counters
from mamba3.engine.draft import ModelDraft, NGramDraft, Proposer
from mamba3.engine.graphs import CaptureFailed
from mamba3.engine.replies import Note, Replies
from mamba3.engine.sampler import Choice, sample
from mamba3.engine.sequence import Sequence
from mamba3.engine.state_pool import StatePool
from mamba3.engine.verify_graphs import VerifyGraphs
from mamba3.lm import Mamba3LM

_log = logging.getLogger(__name__)
Accept = Callable[[list[int]], object]


class Speculation:
    """draft: who guesses, an n-gram lookup if None. graphs: whether verification should be CUDA graphs.

    Raises ValueError for a draft of another vocabulary.
    """

    def __init__(
        self,
        model: Mamba3LM,
        pool: StatePool,
        config: EngineConfig,
        draft: Proposer | None,
        counters: Counters,
        *,
        graphs: bool,
    ):
        if isinstance(draft, ModelDraft) and draft.model.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"A draft needs the model's vocabulary of {model.config.vocab_size} tokens; it has "
                f"{draft.model.config.vocab_size}. Use one trained with the same tokenizer."
            )
        self._model, self._pool, self._most, self._counters = model, pool, config.speculate, counters
        self._draft = draft or NGramDraft()
        self._graphs = VerifyGraphs(model, pool, config.speculate) if graphs and config.speculate else None
        self._device, self._vocabulary = model.embedding.weight.device, model.config.vocab_size
        # Elsewhere than on a CPU a wait at every place costs more than choosing in vain.
        self._at_once = self._device.type != "cpu"

    def step(self, running: list[Sequence], replies: Replies) -> list[Note] | None:
        """Let row i, running[i], read its last token and a guess: the tokens chosen. None, and nothing is read, where guessing
        does not pay."""
        if not self._most or not running:
            return None
        guesses = self._guess(running)
        if 2 * sum(map(bool, guesses)) < len(running) or not any(guesses):
            return None
        logits, accept = self._verify([[s.last, *guess] for s, guess in zip(running, guesses, strict=True)])
        counts, notes = self._choose(running, guesses, logits, replies)
        accept(counts)
        for row, (sequence, guess, count) in enumerate(zip(running, guesses, counts, strict=True)):
            self._pool.advance(row, count)
            self._counters.guessed_tokens += len(guess)
            self._counters.right_guesses += count - 1
            if guess:
                sequence.pace.note(len(guess), count - 1, len(sequence.chosen))
        return notes

    def capture(self) -> Iterator[tuple[int, int]]:
        """Capture the graphs: (how many there are, of how many) after each."""
        try:
            yield from self._graphs.capture() if self._graphs is not None else ()
        except CaptureFailed as error:
            self._without_graphs(error)

    def _without_graphs(self, error: CaptureFailed) -> None:
        _log.warning("guesses are verified without CUDA graphs: %s", error)
        self._graphs = None

    def _guess(self, running: list[Sequence]) -> list[list[int]]:
        """A guess for each sequence; they are empty where graphs are for fewer rows."""
        if self._graphs is not None and len(running) > self._graphs.rows:
            return [[] for _ in running]
        room, guesses = self._most if self._pool.pages is None else min(self._most, self._pool.room), []
        for sequence in running:
            chosen = len(sequence.chosen)
            wanted = sequence.pace.wanted(chosen, min(room, sequence.request.params.max_tokens - chosen - 1))
            guesses.append(self._draft.propose(sequence, wanted) if wanted else [])
        return guesses

    @torch.no_grad()
    def _verify(self, rows: list[list[int]]) -> tuple[Tensor, Accept]:
        """Read tokens of the first rows: logits [n, t, v], and what keeps some of them. Shorter rows are filled up, with what
        nobody looks at."""
        longest, found = max(map(len, rows)), self._replay(rows)
        if found is None:
            tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self._device)
            logits, draft = self._model.verify(tokens, self._pool.view(len(rows), room=longest))
            found = logits, draft.accept
        return found[0][:, :longest, : self._vocabulary], found[1]

    def _replay(self, rows: list[list[int]]) -> tuple[Tensor, Accept] | None:
        """The verification as graphs; None where there are none."""
        if self._graphs is None or not self._graphs.fit:
            return None
        try:
            return self._graphs.verify(rows)
        except CaptureFailed as error:
            return self._without_graphs(error)

    def _choose(
        self, running: list[Sequence], guesses: list[list[int]], logits: Tensor, replies: Replies
    ) -> tuple[list[int], list[Note]]:
        """The tokens chosen from logits [n, t, v], of each sequence as far as its guess is right, and one more."""
        counts, notes, alive = [0] * len(running), [], list(range(len(running)))
        width = logits.shape[1] if self._at_once else 1
        for first in range(0, logits.shape[1], width):
            table = self._table(running, guesses, logits, alive, range(first, first + width))
            for place in range(first, first + width):
                still = []
                for i in alive:
                    note = replies.write_down(running[i], table[i, place], unread=place + 1)
                    notes.append(note)
                    counts[i] += 1
                    if note.reason is None and guesses[i][place : place + 1] == [note.token]:
                        still.append(i)
                alive = still
            if not alive:
                break
        return counts, notes

    def _table(
        self, running: list[Sequence], guesses: list[list[int]], logits: Tensor, alive: list[int], places: range
    ) -> dict[tuple[int, int], Choice]:
        """What each sequence says at each place that its guess reaches, if the guess was right before it."""
        wanted = [(i, place) for i in alive for place in places if place <= len(guesses[i])]
        draws = [running[i].draws.after(guesses[i][places[0] : place]) for i, place in wanted]
        rows, columns = (torch.tensor(index, device=logits.device) for index in zip(*wanted, strict=True))
        return dict(zip(wanted, sample(logits[rows, columns], draws), strict=True))
