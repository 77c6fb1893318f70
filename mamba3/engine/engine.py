"""The engine: requests go in, tokens come out of every `step`.

    step = read one token of each running sequence; admit those whose turn it is; read the next piece of some prompts;
           choose a token for each whose logits are there; give out what was chosen; free the rows of those that ended.

A sequence's state is exact wherever it is: at the end of a piece of prompt, in a row, parked for another's sake, in the
cache. Law: greedy outputs equal `Mamba3LM.generate` token for token whatever arrives when: bitwise with `exact`, otherwise
as far as rounding does not decide between two tokens.

An engine belongs to one thread; `serve.background` gives one to many.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mamba3.engine.config import EngineConfig
from mamba3.engine.draft import ModelDraft, NGramDraft, Proposer
from mamba3.engine.prefix_cache import PrefixCache
from mamba3.engine.request import Finish, FinishReason, Output, Request
from mamba3.engine.runner import Runner
from mamba3.engine.sampler import Choice, Draws, sample, token_logprobs
from mamba3.engine.scheduler import Scheduler
from mamba3.engine.sequence import Sequence, Stage
from mamba3.engine.state_pool import StatePool
from mamba3.engine.text import TextFactory
from mamba3.engine.validation import check_request
from mamba3.lm import LMState, Mamba3LM


@dataclass
class Counters:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0  # read; those that a snapshot spared are not among them
    cached_tokens: int = 0
    chosen_tokens: int = 0
    preemptions: int = 0
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
        self.scheduler = Scheduler(self.config)
        self.pool = StatePool(model, self.config.rows, self.config.max_length)
        self._runner = Runner(model, exact=self.config.exact)
        self._texts = None if tokenizer is None else TextFactory(tokenizer)
        if isinstance(draft, ModelDraft) and draft.model.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"A draft needs the model's vocabulary of {model.config.vocab_size} tokens; it has "
                f"{draft.model.config.vocab_size}. Use one trained with the same tokenizer."
            )
        self._draft = draft or NGramDraft()
        self._bounded = "attention" in model.config.layers
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
        self.scheduler, self._requests = Scheduler(self.config), {}
        self.pool = StatePool(self.model, self.config.rows, self.config.max_length)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.busy

    @property
    def has_room(self) -> bool:
        """Whether the queue takes one more request."""
        return self.scheduler.waiting < self.config.queue

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def step(self) -> list[Output]:
        """One turn of everything under way."""
        self.counters.steps += 1
        self._preempt()
        due: list[tuple[Sequence, Tensor]] = []
        outputs = self._speculate() if self.config.speculate and self.scheduler.running else None
        if self.scheduler.running and outputs is None:
            logits = self._runner.step(self.scheduler.running, self.pool)
            due += zip(self.scheduler.running, logits, strict=True)
        ready, outputs = self._admit(), outputs or []
        pieces = self.scheduler.pieces()
        if pieces:
            ready += self._read(pieces)
        for sequence in ready:
            if sequence.request.params.max_tokens == 0:
                outputs.append(self._finish(sequence, "length"))
            elif sequence.logits is not None:
                due.append((sequence, sequence.logits))
        return outputs + self._choose(due)

    # -- parts of a step

    def _admit(self) -> list[Sequence]:
        """Admit whoever may be: those whose logits are known already come back, to choose their first token."""
        ready = []
        for sequence in self.scheduler.admit():
            if sequence.chosen:  # it was parked
                self._give_row(sequence)
                continue
            if sequence.read == 0 and sequence.request.start is None:
                self._look_up(sequence)
            if sequence.logits is not None:
                self._begin(sequence)
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

        snapshot = self.cache.find(request.owner, request.tokens, usable)
        if snapshot is not None:
            sequence.read = sequence.cached = len(snapshot.tokens)
            sequence.state = snapshot.state
            sequence.logits = snapshot.logits if sequence.read == total else None
            self.counters.cached_tokens += sequence.cached
        cuts = set(range(config.cache_grid, total, config.cache_grid))
        if not config.exact:
            cuts.add(self.cache.branch(request.owner, request.tokens))
        sequence.cuts = sorted(cut for cut in cuts if sequence.read < cut < total)

    def _read(self, pieces: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Read pieces of prompts: the sequences whose prompt ended, ready to choose."""
        ready = []
        for (sequence, count), logits in zip(pieces, self._runner.read(pieces), strict=True):
            self.counters.prompt_tokens += count
            if sequence.wants_prompt_logprobs:
                self._note_prompt(sequence, count, logits)
            done = sequence.unread == 0
            if (done or sequence.read in sequence.cuts) and sequence.request.start is None:
                assert sequence.state is not None
                prefix = sequence.tokens[: sequence.read]
                self.cache.put(sequence.request.owner, prefix, sequence.state, logits[-1] if done else None)
            if done:
                self.scheduler.prompts.remove(sequence)
                sequence.logits = logits[-1]
                self._begin(sequence)
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
        for index in range(params.n - 1, 0, -1):
            draws = Draws(params, sequence.draws.seed, index, read=sequence.draws.read)
            twin = Sequence(
                sequence.request, index, sequence.tokens, draws, read=sequence.read, state=sequence.state,
                logits=sequence.logits, cached=sequence.cached,
            )  # fmt: skip
            if self._texts is not None:
                twin.text = self._texts.start(sequence.request.tokens, params.stop)
            twins.append(twin)
            self.scheduler.put_back(twin, first=True)

    def _begin(self, sequence: Sequence) -> None:
        """The prompt is read: the first continuation's twins come into being, and the state goes into a row."""
        if sequence.index == 0:
            self._fork(sequence)
        self._give_row(sequence)

    def _give_row(self, sequence: Sequence) -> None:
        assert sequence.state is not None
        row = self.pool.add(sequence.state)
        assert row == len(self.scheduler.running)
        self.scheduler.running.append(sequence)
        sequence.state, sequence.stage, sequence.since_admitted = None, Stage.RUNNING, 0

    def _preempt(self) -> None:
        """Park the sequence whose quantum is used up: one copy of its state out of the pool."""
        sequence = self.scheduler.over_quantum()
        if sequence is None:
            return
        row = self.scheduler.running.index(sequence)
        sequence.state = self.pool.read(row)
        self._free_row(row)
        sequence.stage = Stage.WAITING
        self.scheduler.put_back(sequence)
        self.counters.preemptions += 1

    def _free_row(self, row: int) -> None:
        running = self.scheduler.running
        self.pool.free(row)
        last = running.pop()
        if row < len(running):
            running[row] = last

    def _speculate(self) -> list[Output] | None:
        """Guess what the running sequences say next, read it all, keep what is right. None when nobody has a guess."""
        running, pool = list(self.scheduler.running), self.pool
        room = min(self.config.speculate, pool.room) if self._bounded else self.config.speculate
        guesses = [self._draft.propose(s, min(room, s.request.params.max_tokens - len(s.chosen) - 1)) for s in running]
        if not any(guesses):
            return None
        logits, draft = self._runner.verify(running, guesses, pool)
        counts, noted, alive = [0] * len(running), [], list(range(len(running)))
        for place in range(logits.shape[1]):
            choices = sample(logits[alive, place], [running[i].draws for i in alive])
            still = []
            for i, choice in zip(alive, choices, strict=True):
                text, reason = self._write_down(running[i], choice)
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

    def _choose(self, due: list[tuple[Sequence, Tensor]]) -> list[Output]:
        """A token for each sequence from its logits [v]."""
        if not due:
            return []
        logits = torch.stack([row for _, row in due])
        choices = sample(logits, [sequence.draws for sequence, _ in due])
        noted = [
            (sequence, choice, *self._write_down(sequence, choice))
            for (sequence, _), choice in zip(due, choices, strict=True)
        ]
        return [self._give_out(*note) for note in noted]

    def _write_down(self, sequence: Sequence, choice: Choice) -> tuple[str, FinishReason | None]:
        """A token was chosen: the text that it completes, and why the sequence ends with it if it does."""
        params, token = sequence.request.params, choice.token
        sequence.logits = None
        sequence.chosen.append(token)
        sequence.draws.note(token)
        sequence.since_admitted += 1
        self.counters.chosen_tokens += 1
        reason: FinishReason | None = None
        ended = token in params.stop_tokens or (token == self.end_token and not params.ignore_end)
        text = "" if ended or sequence.text is None else sequence.text.push(token)
        if ended or (sequence.text is not None and sequence.text.stopped):
            reason = "stop"
        elif len(sequence.chosen) >= params.max_tokens or self._is_full(sequence):
            reason = "length"
        return text, reason

    def _give_out(self, sequence: Sequence, choice: Choice, text: str, reason: FinishReason | None) -> Output:
        """What the caller hears of a token, and the end of the sequence where it ends."""
        if reason is None:
            return self._output(sequence, choice.token, text, choice)
        return self._finish(sequence, reason, choice.token, text, choice)

    def _is_full(self, sequence: Sequence) -> bool:
        length = len(sequence.request.history) + len(sequence.tokens) + len(sequence.chosen)
        return self._bounded and length > self.config.max_length

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token: int | None = None,
        text: str = "",
        choice: Choice | None = None,
    ) -> Output:
        """End a sequence wherever it is, and give back what it held."""
        request, state = sequence.request, None
        if sequence.text is not None:
            text += sequence.text.finish()
        if sequence.stage is Stage.RUNNING:
            row = self.scheduler.running.index(sequence)
            if reason != "aborted":
                state = self._keep(sequence, row)
            self._free_row(row)
        else:
            self.scheduler.remove(sequence)
        sequence.stage, sequence.state, sequence.logits = Stage.DONE, None, None
        output = self._output(sequence, token, text, choice, Finish(reason, state))
        twins = self._requests[request.id]
        if all(twin.stage is Stage.DONE for twin in twins):
            del self._requests[request.id]
        return output

    def _keep(self, sequence: Sequence, row: int) -> LMState | None:
        """The state at the end of a turn, for the one who asked for it and for the cache."""
        request = sequence.request
        caches = self.config.cache_bytes and request.start is None and not self.config.exact
        if not caches and not request.keep_state:
            return None
        state = self.pool.read(row)
        if caches:
            self.cache.put(request.owner, sequence.seen(), state)
        return state if request.keep_state else None

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
        check_request(request, self.model, self.config, has_text=self._texts is not None)
