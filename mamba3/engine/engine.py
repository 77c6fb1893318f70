"""The engine: requests go in, tokens come out of every `step`.

    step = read one token of each running sequence; admit those whose turn it is; read the next piece of some prompts;
           choose a token for each whose logits are there; free the rows of those that ended; give out what was chosen.

Where steps are graphs, a step launches the reading of the next one (a `Flight`) before it gives out what was chosen: the
device works while text is spelled, outputs are delivered and requests come. It is launched when all ends are known, and so
no row reads more than it would have.

A sequence's state is exact wherever it is: at the end of a piece of prompt, in a row, parked for another's sake, in the
cache. Law: greedy outputs equal `Mamba3LM.generate` token for token whatever arrives when: bitwise with `exact`, otherwise
as far as rounding does not decide between two tokens.

An engine belongs to one thread; `serve.background` gives one to many.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mamba3.engine.config import EngineConfig
from mamba3.engine.counters import Counters
from mamba3.engine.draft import Proposer
from mamba3.engine.flight import Flight
from mamba3.engine.graphs import DecodeGraphs, why_not
from mamba3.engine.paging import longest_sequence, make_pages
from mamba3.engine.prefix_cache import PrefixCache
from mamba3.engine.rehearsal import rehearse
from mamba3.engine.replies import Note, Replies
from mamba3.engine.request import Output, Request
from mamba3.engine.rows import Rows
from mamba3.engine.runner import Runner
from mamba3.engine.sampler import Draws, sample, token_logprobs
from mamba3.engine.scheduler import Scheduler
from mamba3.engine.sequence import Sequence, Stage
from mamba3.engine.speculation import Speculation
from mamba3.engine.state_pool import StatePool
from mamba3.engine.text import TextFactory
from mamba3.engine.validation import check_model, check_request
from mamba3.lm import Mamba3LM


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
        self._speculation = Speculation(
            model, self.pool, self.config, draft, self.counters, graphs=self._why_no_graphs is None
        )
        self._texts = None if tokenizer is None else TextFactory(tokenizer)

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
                outputs.append(self._replies.finish(sequence, "aborted"))
        if self._flight is not None and not self._flight.wanted:
            self._flight = None
        return outputs

    def reset(self) -> None:
        """Forget every request and every snapshot: after a step that failed, when rows may hold anything."""
        self.cache.clear()
        self.pool.clear()
        self._why_no_graphs = self.why_no_graphs
        self._start(self._runner.graphs)

    def _make_pool(self) -> StatePool:
        kept = None if self.config.state_dtype is None else getattr(torch, self.config.state_dtype)
        pages = make_pages(self.model, self.config)
        return StatePool(self.model, self.config.rows, longest_sequence(pages, self.config), pages, kept)

    def _start(self, graphs: DecodeGraphs | None) -> None:
        """What runs over a pool without sequences."""
        self._requests: dict[str, list[Sequence]] = {}
        self._flight: Flight | None = None
        self.scheduler, pages = Scheduler(self.config), self.pool.pages
        self._rows = Rows(self.pool, self.scheduler, self.cache, self._under_way, self.counters)
        self._runner = Runner(self.model, exact=self.config.exact, graphs=graphs, pages=pages)
        self._replies = Replies(
            self.config, self._rows, self.scheduler, self.cache, self._requests, self.counters,
            end_token=self.end_token, longest=None if pages is None else self.pool.max_length,
        )  # fmt: skip

    def rehearse(self) -> Iterator[tuple[int, int]]:
        """Read prompts that are made up, so that a GPU's kernels are compiled before requests come: (done, of how many) after
        each. Nothing on a CPU, where nothing is compiled. Raises ValueError where a full step does not fit in memory."""
        if self.model.embedding.weight.device.type != "cpu":
            yield from rehearse(self.model, self.config)

    def capture(self) -> Iterator[tuple[int, int]]:
        """Capture the CUDA graphs that would otherwise be captured when they are first needed: (done, of how many) after each.
        Nothing where `why_no_graphs` says why there are none. Before requests come: a step under way may lose its logits."""
        yield from self._runner.capture()
        yield from self._speculation.capture()

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
        outputs: list[Output] = []
        if self._flight is None:
            self._make_way()
            guessed = self._speculation.step(list(self.scheduler.running), self._replies)
            if guessed is None:
                self._launch()
            else:
                outputs = self._give_out(guessed)
        ready = self._admit()
        pieces = self.scheduler.pieces()
        if self._rows.paging is not None:
            pieces = self._rows.paging.readable(pieces)
        if pieces:
            ready += self._read(pieces)
        for sequence in ready:
            if sequence.request.params.max_tokens == 0:
                outputs.append(self._replies.finish(sequence, "length"))
        noted = self._choose(ready)
        for note in noted:
            self._replies.release(note)
        if self._runner.graphs is not None and not self.config.speculate:
            self._make_way()
            self._launch()
        return outputs + [self._replies.give_out(note) for note in noted]

    # -- parts of a step

    def _make_way(self) -> None:
        """Rows change hands as turns and pages want it."""
        self._rows.preempt()
        if self._rows.paging is not None:
            self._rows.paging.give_rows(1 + min(self.config.speculate, self.pool.room))

    def _launch(self) -> None:
        """Let the running sequences read the tokens chosen last."""
        if self.scheduler.running:
            self._flight = self._runner.step(self.scheduler.running, self.pool)

    def _admit(self) -> list[Sequence]:
        """Admit whoever may be: those whose logits are known already come back, to choose their first token."""
        ready = []
        paging = self._rows.paging
        admitted = self.scheduler.admit() if paging is None else self.scheduler.admit(paging.admission())
        for sequence in admitted:
            if sequence.chosen:  # it was parked
                self._rows.give(sequence)
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
        return self._rows.give(sequence)

    def _under_way(self) -> Iterator[Sequence]:
        """Every sequence, the oldest first."""
        return itertools.chain.from_iterable(self._requests.values())

    def _choose(self, ready: list[Sequence]) -> list[Note]:
        """A token for each sequence that a step was launched for, and for each whose prompt is read."""
        flight, self._flight = self._flight, None
        chosen = [] if flight is None else flight.land()
        first = [(s, s.logits) for s in ready if s.logits is not None]
        if first:
            sequences, logits = zip(*first, strict=True)
            choices = sample(torch.stack(logits), [sequence.draws for sequence in sequences])
            chosen += zip(sequences, choices, strict=True)
        return [self._replies.write_down(sequence, choice) for sequence, choice in chosen]

    def _give_out(self, noted: list[Note]) -> list[Output]:
        for note in noted:
            self._replies.release(note)
        return [self._replies.give_out(note) for note in noted]

    def check(self, request: Request) -> None:
        """Raises ValueError when the request cannot be served, whatever else is under way."""
        if request.id in self._requests:
            raise ValueError(f"A request's id must be its own; {request.id!r} is under way.")
        longest = None if self.pool.pages is None else self.pool.max_length
        check_request(request, self.model, longest, has_text=self._texts is not None)
