"""`TextStream` turns tokens into text as they come: no piece of a multi-byte character is ever shown."""

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer

from mamba3.text.encode import byte_pieces


class TextStream:
    """Text of a stream of tokens: the concatenation of every `push` and `finish` is the decoded text.

    A character is given out when its last byte is there; bytes that are not UTF-8 come out as U+FFFD. `context` are tokens
    that came before and were shown: the end of a prompt, or the `context` of a stream that was left off and goes on here.
    `pieces`: what `byte_pieces(tokenizer)` gave, where many streams share a tokenizer and the table is made once.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), pieces: list[bytes] | None = None):
        self._tokenizer = tokenizer
        self._pieces = byte_pieces(tokenizer) if pieces is None else pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = 0  # of _ids, how many were given out
        for token in context:
            self.push(token)

    @property
    def context(self) -> list[int]:
        """The last tokens, as far as the text of the next one depends on them."""
        return list(self._ids)

    @property
    def pending(self) -> bool:
        """Whether the last tokens end within a character, which no push has given out."""
        return len(self._ids) > self._shown

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        if self._pieces is not None:
            text = self._decoder.decode(self._pieces[token] if token < len(self._pieces) else b"")
            if not self._decoder.getstate()[0]:
                self._ids.clear()
            return text
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._give_out(text)

    def finish(self) -> str:
        """What is left: the replacement character of a character that never ended."""
        if self._pieces is not None:
            return self._decoder.decode(b"", final=True)
        return self._give_out(self._tokenizer.decode(self._ids))

    def _give_out(self, text: str) -> str:
        before = len(self._tokenizer.decode(self._ids[: self._shown]))
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return text[before:]
