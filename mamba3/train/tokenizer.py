"""Tokenizers in one format, tokenizer.json of the `tokenizers` library: bytes, BPE trained on a corpus, or one at hand.

`TextStream` turns tokens into text as they come: no piece of a multi-byte character is ever shown.
"""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
DEFAULT_BPE_SIZE = 4096
# Names under which public tokenizers keep the token that ends a document, most common first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
# A longer text is encoded in parts that end at a line: an encoding of many megabytes takes a hundred times its size.
_PART = 262_144


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b for b < 256; token 256 ends a text."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int = DEFAULT_BPE_SIZE) -> Tokenizer:
    """Byte-level BPE: any text encodes and decodes exactly. The vocabulary is smaller if the texts offer fewer merges."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and the end of text) but is {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder that holds one."""
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path} holds no {FILE_NAME}; name a tokenizer.json of the tokenizers library (`--tokenizer FILE`)."
        )
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        raise ValueError(f"{file} is not a tokenizer that the tokenizers library can read: {error}.") from error


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that separates documents."""
    for name in _END_OF_TEXT_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise ValueError(
        f"a tokenizer must have an end-of-text token, one of {', '.join(_END_OF_TEXT_NAMES)}; add {END_OF_TEXT} to it."
    )


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each text. A special token that is spelled out in a text is text here, not a separator."""
    parts = [list(_parts(text)) for text in texts]
    literal = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        encodings = tokenizer.encode_batch_fast([p for ps in parts for p in ps], add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = literal
    remaining = iter(encodings)
    return [np.array([i for _ in ps for i in next(remaining).ids], dtype=np.int64) for ps in parts]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes that each token stands for, 0 for special tokens; None where tokens are not pieces of bytes."""
    pieces = _byte_pieces(tokenizer)
    if pieces is None:
        return None
    return np.array([len(piece) for piece in pieces], dtype=np.int64)


class TextStream:
    """Text of a stream of tokens: the concatenation of every `push` and `finish` is the decoded text.

    A character is given out when its last byte is there; bytes that are not UTF-8 come out as U+FFFD. `context` are tokens
    that came before and were shown: the end of a prompt, or the `context` of a stream that was left off and goes on here.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._pieces = _byte_pieces(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = 0  # of _ids, how many were given out
        for token in context:
            self.push(token)

    @property
    def context(self) -> list[int]:
        """The last tokens, as far as the text of the next one depends on them."""
        return list(self._ids)

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


def _parts(text: str) -> Iterable[str]:
    start = 0
    while start < len(text):
        end = start + _PART
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _byte_alphabet() -> list[str]:
    """The printable character by which the byte-level format writes each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def _byte_pieces(tokenizer: Tokenizer) -> list[bytes] | None:
    """The bytes of every token of a byte-level tokenizer, b"" for special ones; None for any other tokenizer."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
    pieces = [b""] * tokenizer.get_vocab_size(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    for token in range(len(pieces)):
        spelled = tokenizer.id_to_token(token)
        if token in added:
            pieces[token] = b"" if added[token].special else added[token].content.encode()
        elif spelled is not None:
            pieces[token] = bytes(byte_of[character] for character in spelled)
    return pieces
