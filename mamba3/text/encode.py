"""Text to tokens, as training and serving read it, and the bytes that a token stands for."""

import json
import threading
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders

END_OF_TEXT = "<|endoftext|>"
# Names under which public tokenizers keep the token that ends a document, most common first.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
# A longer text is encoded in parts that end at a line: an encoding of many megabytes takes a hundred times its size.
_PART = 262_144
# By id, the tokenizer (kept alive, so that no other gets its id), the size of its vocabulary then, and its copy.
_LITERAL: dict[int, tuple[Tokenizer, int, Tokenizer]] = {}
_LITERAL_LOCK = threading.Lock()
_LITERALS_KEPT = 4


def find_end_of_text(tokenizer: Tokenizer) -> int | None:
    """The token that ends a document by one of its usual names, None if there is none."""
    tokens = (tokenizer.token_to_id(name) for name in _END_OF_TEXT_NAMES)
    return next((token for token in tokens if token is not None), None)


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that separates documents. Raises ValueError if there is none."""
    token = find_end_of_text(tokenizer)
    if token is not None:
        return token
    raise ValueError(
        f"a tokenizer must have an end-of-text token, one of {', '.join(_END_OF_TEXT_NAMES)}; add {END_OF_TEXT} to it."
    )


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each text. A special token that is spelled out in a text is text here, not a separator."""
    parts = [list(split_text(text)) for text in texts]
    encodings = _literal(tokenizer).encode_batch_fast([p for ps in parts for p in ps], add_special_tokens=False)
    remaining = iter(encodings)
    return [np.array([i for _ in ps for i in next(remaining).ids], dtype=np.int64) for ps in parts]


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """A copy to which special tokens are text, made once. The tokenizer itself is shared by threads and never changed."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    with _LITERAL_LOCK:
        known = _LITERAL.get(id(tokenizer))
        if known is not None and known[0] is tokenizer and known[1] == size:
            return known[2]
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.encode_special_tokens = True
        _without_useless_cache(copy)
        _LITERAL.pop(id(tokenizer), None)
        while len(_LITERAL) >= _LITERALS_KEPT:
            del _LITERAL[next(iter(_LITERAL))]
        _LITERAL[id(tokenizer)] = (tokenizer, size, copy)
        return copy


def _without_useless_cache(tokenizer: Tokenizer) -> None:
    """A tokenizer of bytes merges nothing, and yet the library keeps the tokens of 10,000 texts for each thread: megabytes.

    tokenizers 0.23 has no public name for it; where this one is gone, the memory is taken as before.
    """
    model = json.loads(tokenizer.to_str())["model"]
    resize = getattr(tokenizer.model, "_resize_cache", None)
    if model.get("merges") == [] and resize is not None:
        resize(0)


def split_text(text: str) -> Iterable[str]:
    """The text in parts of bounded size that end at a line where there is one."""
    start = 0
    while start < len(text):
        end = start + _PART
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def byte_alphabet() -> list[str]:
    """The printable character by which the byte-level format writes each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def byte_pieces(tokenizer: Tokenizer) -> list[bytes] | None:
    """The bytes of every token of a byte-level tokenizer, b"" for special ones; None for any other tokenizer."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    pieces = [b""] * tokenizer.get_vocab_size(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    for token in range(len(pieces)):
        spelled = tokenizer.id_to_token(token)
        if token in added:
            pieces[token] = b"" if added[token].special else added[token].content.encode()
        elif spelled is not None:
            pieces[token] = bytes(byte_of[character] for character in spelled)
    return pieces
