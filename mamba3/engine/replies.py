"""What becomes of a token that was chosen, in three parts, of which the next step of the model waits for the first two.

    write_down: the sequence has said it, and may end with it.
    release: a sequence that ended gives back its row and whatever else it held.
    give_out: the text that the token completes; what the caller hears.

Text is spelled in the third part, but where a stop string may end the sequence, something else has, or several tokens come
at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from mamba3.engine.config import EngineConfig
from mamba3.engine.counters import Counters
from mamba3.engine.pages import OutOfPages
from mamba3.engine.paging import said
from mamba3.engine.prefix_cache import PrefixCache
from mamba3.engine.request import Finish, FinishReason, Output, TokenLogprob
from mamba3.engine.rows import Rows
from mamba3.engine.sampler import Choice
from mamba3.engine.scheduler import Scheduler
from mamba3.engine.sequence import Mark, Sequence, Stage


@dataclass(slots=True)
class Note:
    """A token of a sequence, or none, on its way to the caller. text: None until it is spelled. finish: of one that ended,
    once it is released."""

    sequence: Sequence
    token: int | None
    logprob: TokenLogprob | None = None
    reason: FinishReason | None = None
    text: str | None = None
    finish: Finish | None = None


class Replies:
    """requests: the continuations of each one under way. longest: tokens of one sequence, None for any number."""

    def __init__(
        self,
        config: EngineConfig,
        rows: Rows,
        scheduler: Scheduler,
        cache: PrefixCache,
        requests: MutableMapping[str, list[Sequence]],
        counters: Counters,
        *,
        end_token: int | None,
        longest: int | None,
    ):
        self._rows, self._scheduler, self._cache, self._requests = rows, scheduler, cache, requests
        self._config, self._counters, self._end_token, self._longest = config, counters, end_token, longest

    def write_down(self, sequence: Sequence, choice: Choice, unread: int = 0) -> Note:
        """A token was chosen. unread: tokens chosen before it that the sequence's row has not read."""
        token, logprob = choice
        params, text, chosen = sequence.request.params, sequence.text, sequence.chosen
        note = Note(sequence, token, logprob)
        sequence.logits = None
        chosen.append(token)
        sequence.draws.note(token)
        sequence.since_admitted += 1
        self._counters.chosen_tokens += 1
        ended = token in params.stop_tokens or (token == self._end_token and not params.ignore_end)
        if ended or text is None:
            note.text = ""
        elif params.stop or unread:  # others follow at once, and are spelled after it
            note.text = text.push(token)
            if params.stop and sequence.request.keep_state:
                self._mark(sequence, len(chosen) - 1 - unread)
        if ended or (params.stop and text is not None and text.stopped):
            note.reason = "stop"
        elif len(chosen) >= params.max_tokens or (self._longest is not None and said(sequence) > self._longest):
            note.reason = "length"
        return note

    def release(self, note: Note) -> None:
        """End the note's sequence, wherever it is, where the note has a reason for it."""
        if note.reason is None:
            return
        sequence, request = note.sequence, note.sequence.request
        note.text, note.finish = self._spell(note), Finish(note.reason)
        if sequence.text is not None:
            note.text += sequence.text.finish()
        if note.reason != "aborted":
            note.finish = self._keep(sequence, note.reason)
        if sequence.stage is Stage.RUNNING:
            self._rows.free(sequence)
        else:
            self._scheduler.remove(sequence)
        sequence.stage, sequence.state, sequence.logits, sequence.mark = Stage.DONE, None, None, None
        if all(twin.stage is Stage.DONE for twin in self._requests[request.id]):
            del self._requests[request.id]

    def give_out(self, note: Note) -> Output:
        """What the caller hears."""
        sequence, prompt = note.sequence, ()
        if sequence.prompt_logprobs and len(sequence.chosen) <= 1:
            prompt = tuple(sequence.prompt_logprobs)
        return Output(
            sequence.request.id, sequence.index, note.token, self._spell(note), note.logprob, note.finish,
            sequence.cached, prompt,
        )  # fmt: skip

    def finish(self, sequence: Sequence, reason: FinishReason) -> Output:
        """End a sequence without another token."""
        note = Note(sequence, None, reason=reason, text="")
        self.release(note)
        return self.give_out(note)

    # -- parts

    def _spell(self, note: Note) -> str:
        if note.text is not None:
            return note.text
        assert note.sequence.text is not None and note.token is not None
        return note.sequence.text.push(note.token)

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
            sequence.mark = Mark(self._rows.read(sequence), tokens, characters)

    def _keep(self, sequence: Sequence, reason: FinishReason) -> Finish:
        """The state at the end of a turn, for the one who asked for it and for the cache."""
        request, text = sequence.request, sequence.text
        stopped = reason == "stop" and text is not None and text.stopped
        caches = self._config.cache_bytes and request.start is None and not self._config.exact
        if caches and sequence.stage is Stage.RUNNING:
            with contextlib.suppress(OutOfPages):
                self._cache.put(request.reader, sequence.seen(), self._rows.share(sequence))
        if not request.keep_state:
            return Finish(reason)
        if stopped:
            return Finish(reason) if sequence.mark is None else Finish(reason, *sequence.mark)
        state = self._rows.read(sequence)
        return Finish(reason, state, max(0, len(sequence.chosen) - 1), 0 if text is None else text.characters)
