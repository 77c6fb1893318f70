"""Tokenizers in one format, tokenizer.json of the `tokenizers` library: bytes, BPE trained on a corpus, or one at hand."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mamba3.text.encode import END_OF_TEXT, byte_alphabet, byte_pieces, encode, end_of_text, split_text
from mamba3.text.stream import TextStream

__all__ = [
    "DEFAULT_BPE_SIZE", "END_OF_TEXT", "FILE_NAME", "TextStream", "byte_tokenizer", "encode", "end_of_text",
    "load_tokenizer", "token_bytes", "train_bpe",
]  # fmt: skip

FILE_NAME = "tokenizer.json"
DEFAULT_BPE_SIZE = 4096


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b for b < 256; token 256 ends a text."""
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
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
    tokenizer.train_from_iterator((part for text in texts for part in split_text(text)), trainer)
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


def token_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes that each token stands for, 0 for special tokens; None where tokens are not pieces of bytes."""
    pieces = byte_pieces(tokenizer)
    if pieces is None:
        return None
    return np.array([len(piece) for piece in pieces], dtype=np.int64)
