"""The text of a continuation as its tokens come: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from mamba3.text.encode import byte_pieces
from mamba3.text.stop import StopText
from mamba3.text.stream import TextStream

_CONTEXT = 8  # tokens of the prompt's end that may decide how the next token is spelled


class TextFactory:
    """Makes the texts of an engine's continuations; the table of token bytes is made once."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self._pieces = tokenizer, byte_pieces(tokenizer)

    def start(self, prompt: Sequence[int], stops: Sequence[str]) -> ContinuationText:
        """The text that follows a prompt."""
        stream = TextStream(self.tokenizer, prompt[max(0, len(prompt) - _CONTEXT) :], self._pieces)
        return ContinuationText(stream, StopText(list(stops)))


class ContinuationText:
    """Text of one continuation; `stopped` once a stop string was found."""

    def __init__(self, stream: TextStream, stop: StopText):
        self._stream, self._stop = stream, stop
        self.characters = 0  # shown
        self._heard = 0  # characters shown or held back
        self._ends: list[int | None] = [None if stream.pending else 0]

    @property
    def stopped(self) -> bool:
        return self._stop.found

    @property
    def holds(self) -> bool:
        """Whether something that the tokens say is not shown: it may begin a stop string, or did, or is half a character."""
        return self.stopped or self._stream.pending or self.characters < self._heard

    def shown_after(self, tokens: int) -> int | None:
        """How many characters the first tokens spell, if those are whole and shown: no stop string begins in them."""
        end = self._ends[tokens]
        return end if end is not None and end <= self.characters else None

    def push(self, token: int) -> str:
        """What can be shown after this token."""
        heard = self._stream.push(token)
        self._heard += len(heard)
        self._ends.append(None if self._stream.pending else self._heard)
        return self._show(self._stop.push(heard))

    def finish(self) -> str:
        """What was held back; nothing after a stop string."""
        return "" if self.stopped else self._show(self._stop.push(self._stream.finish()) + self._stop.finish())

    def _show(self, text: str) -> str:
        self.characters += len(text)
        return text
