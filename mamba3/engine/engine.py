"""The engine: requests go in, tokens come out of every `step`.

    step = read one token of each running sequence; admit those whose turn it is; read the next piece of some prompts;
           choose a token for each whose logits are there; give out what was chosen; free the rows of those that ended.

A sequence's state is exact wherever it is: at the end of a piece of prompt, in a row, parked for another's sake, in the
cache. Law: greedy outputs equal `Mamba3LM.generate` token for token whatever arrives when: bitwise with `exact`, otherwise
as far as rounding does not decide between two tokens.

An engine belongs to one thread; `serve.background` gives one to many.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mamba3.engine.config import EngineConfig
from mamba3.engine.draft import ModelDraft, NGramDraft, Proposer
from mamba3.engine.graphs import DecodeGraphs, why_not
from mamba3.engine.pages import OutOfPages
from mamba3.engine.paging import Paging, longest_sequence, make_pages
from mamba3.engine.prefix_cache import PrefixCache
from mamba3.engine.request import Finish, FinishReason, Output, Request
from mamba3.engine.runner import Runner
from mamba3.engine.sampler import Choice, Draws, sample, token_logprobs
from mamba3.engine.scheduler import Scheduler
from mamba3.engine.sequence import Mark, Sequence, Stage
from mamba3.engine.state_pool import StatePool
from mamba3.engine.text import TextFactory
from mamba3.engine.validation import check_model, check_request
from mamba3.lm import LMState, Mamba3LM


@dataclass
class Counters:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0  # read; those that a snapshot spared are not among them
    cached_tokens: int = 0
    chosen_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0  # sequences whose state left the pages for others' sake
    guessed_tokens: int = 0
    right_guesses: int = 0


class Engine:
    """Continuous batching over a pool of states.

    tokenizer: for outputs with text and for stop strings. end_token: ends a continuation unless `ignore_end`. draft: who
    guesses where `config.speculate` is set; an n-gram lookup if None.
    """

    def __init__(
        self,
        model: Mamba3LM,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        end_token: int | None = None,
        draft: Proposer | None = None,
    ):
        self.model, self.config, self.end_token = model.eval(), config or EngineConfig(), end_token
        self.cache = PrefixCache(self.config.cache_bytes)
        self.counters = Counters()
        check_model(model, self.config)
        self._why_no_graphs = why_not(model, self.config)
        self.pool = self._make_pool()
        self._start(DecodeGraphs(model, self.pool) if self._why_no_graphs is None else None)
        self._texts = None if tokenizer is None else TextFactory(tokenizer)
        if isinstance(draft, ModelDraft) and draft.model.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"A draft needs the model's vocabulary of {model.config.vocab_size} tokens; it has "
                f"{draft.model.config.vocab_size}. Use one trained with the same tokenizer."
            )
        self._draft = draft or NGramDraft()
        self._requests: dict[str, list[Sequence]] = {}

    # -- requests

    def add(self, request: Request) -> None:
        """Take a request in. Raises ValueError when it cannot be served, QueueFull when too many wait."""
        params, tokens = request.params, np.asarray(request.tokens, dtype=np.int64)
        self.check(request)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        read = {*request.history, *tokens.tolist()} if params.repetition_penalty != 1 else set()
        sequence = Sequence(request, 0, tokens, Draws(params, seed, read=read), state=request.start)
        if self._texts is not None:
            sequence.text = self._texts.start(request.tokens, params.stop)
        self.scheduler.add(sequence)
        self._requests[request.id] = [sequence]

    def abort(self, request_id: str) -> list[Output]:
        """Stop a request wherever it is; its rows are free at once. Its last outputs; none when it is over or unknown."""
        outputs = []
        for sequence in list(self._requests.get(request_id, ())):
            if sequence.stage is not Stage.DONE:
                outputs.append(self._finish(sequence, "aborted"))
        return outputs

    def reset(self) -> None:
        """Forget every request and every snapshot: after a step that failed, when rows may hold anything."""
        self.cache.clear()
        self._requests = {}
        self.pool.clear()
        self._why_no_graphs = self.why_no_graphs
        self._start(self._runner.graphs)

    def _make_pool(self) -> StatePool:
        kept = None if self.config.state_dtype is None else getattr(torch, self.config.state_dtype)
        pages = make_pages(self.model, self.config)
        return StatePool(self.model, self.config.rows, longest_sequence(pages, self.config), pages, kept)

    def _start(self, graphs: DecodeGraphs | None) -> None:
        """What runs over a pool without sequences."""
        self.scheduler, self._paging, pages = Scheduler(self.config), None, self.pool.pages
        if pages is not None:
            self._paging = Paging(self.pool, pages, self.scheduler, self.cache, self._under_way, self._swap_out)
        self._runner = Runner(self.model, exact=self.config.exact, graphs=graphs, pages=pages)

    def capture(self) -> Iterator[tuple[int, int]]:
        """Capture the CUDA graphs that would otherwise be captured when they are first needed: (done, of how many) after each.
        Nothing where `why_no_graphs` says why there are none."""
        yield from self._runner.capture()

    @property
    def why_no_graphs(self) -> str | None:
        """Why steps are no CUDA graphs; None where they are."""
        return self._runner.failure or self._why_no_graphs

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.busy

    def has_room(self, owner: str = "") -> bool:
        """Whether the owner's queue takes one more request."""
        return self.scheduler.has_room(owner)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def step(self) -> list[Output]:
        """One turn of everything under way."""
        self.counters.steps += 1
        self._preempt()
        if self._paging is not None:
            self._paging.give_rows(1 + min(self.config.speculate, self.pool.room))
        due: list[Sequence] = []
        logits: list[Tensor] = []  # [n, v] each; together of those that are due
        outputs = self._speculate() if self.config.speculate and self.scheduler.running else None
        if self.scheduler.running and outputs is None:
            due += self.scheduler.running
            logits.append(self._runner.step(due, self.pool))
        ready, outputs = self._admit(), outputs or []
        pieces = self.scheduler.pieces()
        if self._paging is not None:
            pieces = self._paging.readable(pieces)
        if pieces:
            ready += self._read(pieces)
        for sequence in ready:
            if sequence.request.params.max_tokens == 0:
                outputs.append(self._finish(sequence, "length"))
            elif sequence.logits is not None:
                due.append(sequence)
                logits.append(sequence.logits[None])
        return outputs + self._choose(due, logits)

    # -- parts of a step

    def _admit(self) -> list[Sequence]:
        """Admit whoever may be: those whose logits are known already come back, to choose their first token."""
        ready = []
        admitted = self.scheduler.admit() if self._paging is None else self.scheduler.admit(self._paging.admission())
        for sequence in admitted:
            if sequence.chosen:  # it was parked
                self._give_row(sequence)
                continue
            if sequence.read == 0 and sequence.request.start is None:
                self._look_up(sequence)
            if sequence.logits is not None:
                if self._begin(sequence):
                    ready.append(sequence)
            else:
                sequence.stage = Stage.PROMPT
                self.scheduler.prompts.append(sequence)
        return ready

    def _look_up(self, sequence: Sequence) -> None:
        """Begin where the longest snapshot of the prompt ends, and plan the snapshots of the rest."""
        request, config, total = sequence.request, self.config, len(sequence.tokens)
        if config.cache_bytes == 0 or sequence.wants_prompt_logprobs:
            return

        def usable(length: int) -> bool:
            return not config.exact or length == total or length % config.prefill_chunk == 0

        snapshot = self.cache.find(request.reader, request.tokens, usable)
        if snapshot is not None:
            sequence.read = sequence.cached = len(snapshot.tokens)
            sequence.state = snapshot.state
            sequence.logits = snapshot.logits if sequence.read == total else None
            self.counters.cached_tokens += sequence.cached
        cuts = set(range(config.cache_grid, total, config.cache_grid))
        if not config.exact:
            cuts.add(self.cache.branch(request.reader, request.tokens))
        sequence.cuts = sorted(cut for cut in cuts if sequence.read < cut < total)

    def _read(self, pieces: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Read pieces of prompts: the sequences whose prompt ended, ready to choose."""
        ready = []
        for (sequence, count), logits in zip(pieces, self._runner.read(pieces), strict=True):
            self.counters.prompt_tokens += count
            if sequence.wants_prompt_logprobs:
                self._note_prompt(sequence, count, logits)
            done = sequence.unread == 0
            if sequence.stage is not Stage.PROMPT:  # it was swapped out for one before it
                sequence.logits = logits[-1] if done else None
                continue
            if (done or sequence.read in sequence.cuts) and sequence.request.start is None:
                assert sequence.state is not None
                prefix = sequence.tokens[: sequence.read]
                self.cache.put(sequence.request.reader, prefix, sequence.state, logits[-1] if done else None)
            if done:
                self.scheduler.prompts.remove(sequence)
                sequence.logits = logits[-1]
                if self._begin(sequence):
                    ready.append(sequence)
        return ready

    def _note_prompt(self, sequence: Sequence, count: int, logits: Tensor) -> None:
        """Log probabilities of the tokens that the piece just read predicts: logits [count, v] are of their successors."""
        known, top = sequence.prompt_logprobs, sequence.request.params.prompt_logprobs or 0
        if not known:
            known.append(None)  # nothing predicts the first token
        first = sequence.read - count + 1
        following = sequence.tokens[first : sequence.read + 1].tolist()
        if following:
            known += token_logprobs(logits[: len(following)], following, top)

    def _fork(self, sequence: Sequence) -> None:
        """The other continuations of the request: they wait for rows with the state and logits that the first one has."""
        params = sequence.request.params
        twins = self._requests[sequence.request.id]
        if len(twins) > 1:
            return  # it forked before, and got no row
        for index in range(params.n - 1, 0, -1):
            draws = Draws(params, sequence.draws.seed, index, read=sequence.draws.read)
            twin = Sequence(
                sequence.request, index, sequence.tokens, draws, read=sequence.read, state=sequence.state,
                logits=sequence.logits, cached=sequence.cached, prompt_logprobs=sequence.prompt_logprobs,
            )  # fmt: skip
            if self._texts is not None:
                twin.text = self._texts.start(sequence.request.tokens, params.stop)
            twins.append(twin)
            self.scheduler.put_back(twin, first=True)

    def _begin(self, sequence: Sequence) -> bool:
        """The prompt is read: the first continuation's twins come into being, and the state goes into a row if it can."""
        if sequence.index == 0:
            self._fork(sequence)
        return self._give_row(sequence)

    def _give_row(self, sequence: Sequence) -> bool:
        """Whether the sequence got a row; where there are no pages for it, it waits on."""
        assert sequence.state is not None
        sequence.stage = Stage.WAITING
        if self._paging is not None and not self._paging.suffice(sequence):
            self.scheduler.put_back(sequence)
            return False
        row = self.pool.add(sequence.state)
        assert row == len(self.scheduler.running)
        self.scheduler.running.append(sequence)
        sequence.state, sequence.stage, sequence.since_admitted = None, Stage.RUNNING, 0
        return True

    def _preempt(self) -> None:
        """Park the sequence whose quantum is used up: one copy of its state out of the pool."""
        sequence = self.scheduler.over_quantum()
        if sequence is None:
            return
        row = self.scheduler.running.index(sequence)
        try:
            sequence.state = self.pool.share(row)
        except OutOfPages:
            sequence.state = self.pool.read(row).to("cpu")
        self._free_row(row)
        sequence.stage = Stage.WAITING
        self.scheduler.put_back(sequence)
        self.counters.preemptions += 1

    def _under_way(self) -> Iterator[Sequence]:
        """Every sequence, the oldest first."""
        return itertools.chain.from_iterable(self._requests.values())

    def _swap_out(self, sequence: Sequence) -> None:
        """Take a sequence's state out of its row and out of the pages, for others' sake."""
        if sequence.stage is Stage.RUNNING:
            row = self.scheduler.running.index(sequence)
            sequence.state = self.pool.read(row)
            self._free_row(row)
        elif sequence.stage is Stage.PROMPT:
            self.scheduler.remove(sequence)
        assert sequence.state is not None and self.pool.pages is not None
        sequence.state = self.pool.pages.fetch(sequence.state).to("cpu")
        if sequence.stage is not Stage.WAITING:
            sequence.stage = Stage.WAITING
            self.scheduler.put_back(sequence, first=True)
        self.counters.swaps += 1

    def _free_row(self, row: int) -> None:
        running = self.scheduler.running
        self.pool.free(row)
        last = running.pop()
        if row < len(running):
            running[row] = last

    def _speculate(self) -> list[Output] | None:
        """Guess what the running sequences say next, read it all, keep what is right. None when nobody has a guess."""
        running, pool = list(self.scheduler.running), self.pool
        room = self.config.speculate if pool.pages is None else min(self.config.speculate, pool.room)
        guesses = [self._draft.propose(s, min(room, s.request.params.max_tokens - len(s.chosen) - 1)) for s in running]
        if not any(guesses):
            return None
        logits, draft = self._runner.verify(running, guesses, pool)
        counts, noted, alive = [0] * len(running), [], list(range(len(running)))
        for place in range(logits.shape[1]):
            choices = sample(logits[alive, place], [running[i].draws for i in alive])
            still = []
            for i, choice in zip(alive, choices, strict=True):
                text, reason = self._write_down(running[i], choice, unread=place + 1)
                noted.append((running[i], choice, text, reason))
                counts[i] += 1
                if reason is None and guesses[i][place : place + 1] == [choice.token]:
                    still.append(i)
            alive = still
            if not alive:
                break
        draft.accept(counts)
        for row, count in enumerate(counts):
            pool.advance(row, count)
        self.counters.guessed_tokens += sum(map(len, guesses))
        self.counters.right_guesses += sum(counts) - len(running)
        return [self._give_out(*note) for note in noted]

    def _choose(self, due: list[Sequence], logits: list[Tensor]) -> list[Output]:
        """A token for each sequence from the logits, [n, v] in all."""
        if not due:
            return []
        choices = sample(logits[0] if len(logits) == 1 else torch.cat(logits), [sequence.draws for sequence in due])
        noted = [
            (sequence, choice, *self._write_down(sequence, choice))
            for sequence, choice in zip(due, choices, strict=True)
        ]
        return [self._give_out(*note) for note in noted]

    def _write_down(self, sequence: Sequence, choice: Choice, unread: int = 0) -> tuple[str, FinishReason | None]:
        """A token was chosen: the text that it completes, and why the sequence ends with it if it does.

        unread: tokens chosen before it that the sequence's row has not read.
        """
        params, token = sequence.request.params, choice.token
        sequence.logits = None
        sequence.chosen.append(token)
        sequence.draws.note(token)
        sequence.since_admitted += 1
        self.counters.chosen_tokens += 1
        reason: FinishReason | None = None
        ended = token in params.stop_tokens or (token == self.end_token and not params.ignore_end)
        text = "" if ended or sequence.text is None else sequence.text.push(token)
        if not ended and params.stop and sequence.request.keep_state:
            self._mark(sequence, len(sequence.chosen) - 1 - unread)
        if ended or (sequence.text is not None and sequence.text.stopped):
            reason = "stop"
        elif len(sequence.chosen) >= params.max_tokens or self._is_full(sequence):
            reason = "length"
        return text, reason

    def _mark(self, sequence: Sequence, tokens: int) -> None:
        """Keep the state in the row, which has read so many of the tokens chosen, while a stop string may begin after them.

        After it was found the state would have read a part of it; this one is exact for what is shown.
        """
        assert sequence.text is not None
        if not sequence.text.holds:
            sequence.mark = None
            return
        characters = sequence.text.shown_after(tokens)
        if characters is not None and (sequence.mark is None or sequence.mark.tokens < tokens):
            sequence.mark = Mark(self._state_of(sequence), tokens, characters)

    def _state_of(self, sequence: Sequence) -> LMState:
        """What a sequence has read: a copy of its row, or, where it made way for another after it was read, what was kept."""
        if sequence.stage is Stage.RUNNING:
            return self.pool.read(self.scheduler.running.index(sequence))
        assert sequence.state is not None
        return sequence.state

    def _give_out(self, sequence: Sequence, choice: Choice, text: str, reason: FinishReason | None) -> Output:
        """What the caller hears of a token, and the end of the sequence where it ends."""
        if reason is None:
            return self._output(sequence, choice.token, text, choice)
        return self._finish(sequence, reason, choice.token, text, choice)

    def _is_full(self, sequence: Sequence) -> bool:
        length = len(sequence.request.history) + len(sequence.tokens) + len(sequence.chosen)
        return self.pool.pages is not None and length > self.pool.max_length

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token: int | None = None,
        text: str = "",
        choice: Choice | None = None,
    ) -> Output:
        """End a sequence wherever it is, and give back what it held."""
        request, finish = sequence.request, Finish(reason)
        if sequence.text is not None:
            text += sequence.text.finish()
        if reason != "aborted":
            finish = self._keep(sequence, reason)
        if sequence.stage is Stage.RUNNING:
            self._free_row(self.scheduler.running.index(sequence))
        else:
            self.scheduler.remove(sequence)
        sequence.stage, sequence.state, sequence.logits, sequence.mark = Stage.DONE, None, None, None
        output = self._output(sequence, token, text, choice, finish)
        twins = self._requests[request.id]
        if all(twin.stage is Stage.DONE for twin in twins):
            del self._requests[request.id]
        return output

    def _keep(self, sequence: Sequence, reason: FinishReason) -> Finish:
        """The state at the end of a turn, for the one who asked for it and for the cache."""
        request, text = sequence.request, sequence.text
        stopped = reason == "stop" and text is not None and text.stopped
        caches = self.config.cache_bytes and request.start is None and not self.config.exact
        if caches and sequence.stage is Stage.RUNNING:
            with contextlib.suppress(OutOfPages):
                state = self.pool.share(self.scheduler.running.index(sequence))
                self.cache.put(request.reader, sequence.seen(), state)
        if not request.keep_state:
            return Finish(reason)
        if stopped:
            return Finish(reason) if sequence.mark is None else Finish(reason, *sequence.mark)
        characters = 0 if text is None else text.characters
        return Finish(reason, self._state_of(sequence), max(0, len(sequence.chosen) - 1), characters)

    def _output(
        self, sequence: Sequence, token: int | None, text: str, choice: Choice | None, finish: Finish | None = None
    ) -> Output:
        prompt = ()
        if sequence.prompt_logprobs and len(sequence.chosen) <= 1:
            prompt = tuple(sequence.prompt_logprobs)
        logprob = None if choice is None else choice.logprob
        return Output(sequence.request.id, sequence.index, token, text, logprob, finish, sequence.cached, prompt)

    def check(self, request: Request) -> None:
        """Raises ValueError when the request cannot be served, whatever else is under way."""
        if request.id in self._requests:
            raise ValueError(f"A request's id must be its own; {request.id!r} is under way.")
        longest = None if self.pool.pages is None else self.pool.max_length
        check_request(request, self.model, longest, has_text=self._texts is not None)
