"""Tokens on disk: memory-mapped shards for training and for validation, with the documents' offsets.

A document is stored as end-of-text, its tokens, end-of-text: the first lets a model begin a document, the second lets
it end one. A store is found again by a key of the corpus's contents, the split and the tokenizer; another key rebuilds.
Laws: the shards do not depend on how many processes made them; no document lies in two shards.
"""

import hashlib
import json
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mamba3.train.corpus import SplitCorpus
from mamba3.train.folder import new_folder
from mamba3.train.tokenise import Group, encoded_groups
from mamba3.train.tokenizer import end_of_text

_FORMAT = 2
_GROUP_BYTES = 4 << 20  # documents are encoded in groups of about this size
_INDEX = "index.json"
PARTS = ("train", "val")
SHARD_TOKENS = 1 << 27


@dataclass(frozen=True)
class Tokens:
    """Documents end to end, in shards. `offsets` [documents + 1]: document i is tokens offsets[i] to offsets[i + 1]."""

    shards: Sequence[np.ndarray]
    offsets: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all of a document but its first."""
        return int(self.offsets[-1]) - self.documents

    @cached_property
    def _bases(self) -> list[int]:
        return np.cumsum([0, *(len(shard) for shard in self.shards)]).tolist()

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from `start` on, within one shard, as the tokens of one document are."""
        shard = bisect_right(self._bases, start) - 1
        begin = start - self._bases[shard]
        return self.shards[shard][begin : begin + length]


@dataclass(frozen=True)
class TokenStore:
    """The two parts of a tokenised corpus, memory-mapped, and the key that they were built from."""

    train: Tokens
    val: Tokens
    key: str


def store_key(corpus: SplitCorpus, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS) -> str:
    facts = f"{_FORMAT}\n{shard_tokens}\n{corpus.fingerprint}\n{tokenizer.to_str()}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def open_or_build(
    corpus: SplitCorpus,
    tokenizer: Tokenizer,
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """The store of this corpus and tokenizer under `folder`, tokenised now unless it is there; others are removed.

    `on_progress(bytes done, bytes in all)` is told how far tokenising is. workers: see `TrainConfig`.
    Raises OSError, with nothing left behind, if it cannot be written, and ValueError for a document longer than a shard.
    """
    key = store_key(corpus, tokenizer, shard_tokens)
    place = folder / key
    if not _is_whole(place):
        try:
            with new_folder(place) as building:
                _build(corpus, tokenizer, building, on_progress, workers, shard_tokens)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the tokens could not be written to {place} ({error.strerror}) and nothing was left there; a corpus of "
                f"{corpus.bytes:,} bytes takes at most {4 * corpus.bytes:,}: free some space or take another folder",
            ) from error
    for other in folder.iterdir():
        if other != place:
            shutil.rmtree(other, ignore_errors=True)
    return TokenStore(open_part(place, "train"), open_part(place, "val"), key)


class _Part:
    """The shards of one part while they are written."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, files: ExitStack):
        self.folder, self.name, self.limit, self.files = folder, name, shard_tokens, files
        self.sizes: list[int] = []
        self.offsets = [0]

    def add(self, document: str, tokens: np.ndarray) -> None:
        if len(tokens) > self.limit:
            raise ValueError(
                f"a document must fit into one shard of {self.limit:,} tokens, but {document} has {len(tokens):,}; raise "
                "shard_tokens (--shard-tokens) or divide the document."
            )
        if not self.sizes or self.sizes[-1] + len(tokens) > self.limit:
            self._file = self.files.enter_context((self.folder / shard_name(self.name, len(self.sizes))).open("wb"))
            self.sizes.append(0)
        self._file.write(tokens.tobytes())
        self.sizes[-1] += len(tokens)
        self.offsets.append(self.offsets[-1] + len(tokens))


def _build(
    corpus: SplitCorpus,
    tokenizer: Tokenizer,
    folder: Path,
    on_progress: Callable[[int, int], None] | None,
    workers: int,
    shard_tokens: int,
) -> None:
    separator = end_of_text(tokenizer)
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size(with_added_tokens=True) <= 1 << 16 else np.uint32)
    done = 0
    with ExitStack() as files:
        parts = {name: _Part(folder, name, shard_tokens, files) for name in PARTS}
        for group, encoded in encoded_groups(_groups(corpus), tokenizer, workers, corpus.bytes):
            for (document, held_out), ids in zip(group, encoded, strict=True):
                stored = np.concatenate([[separator], ids, [separator]]).astype(dtype)
                parts["val" if held_out else "train"].add(document.name, stored)
                done += len(document.text.encode())
            if on_progress is not None:
                on_progress(done, corpus.bytes)
    for name, part in parts.items():
        np.save(folder / f"{name}.offsets.npy", np.array(part.offsets, dtype=np.int64))
    sizes = {name: part.sizes for name, part in parts.items()}
    (folder / _INDEX).write_text(json.dumps({"dtype": dtype.name, "tokens": sizes}))


def shard_name(part: str, number: int) -> str:
    return f"{part}-{number:05d}.bin"


def _groups(corpus: SplitCorpus) -> Iterable[Group]:
    group, size = [], 0
    for document, held_out in corpus:
        group.append((document, held_out))
        size += len(document.text)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _is_whole(place: Path) -> bool:
    """Whether every file of a store is there in the size its index states."""
    index = place / _INDEX
    if not index.is_file():
        return False
    stated = json.loads(index.read_text())
    width = np.dtype(stated["dtype"]).itemsize
    files = {
        place / shard_name(part, i): size * width for part in PARTS for i, size in enumerate(stated["tokens"][part])
    }
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items()) and all(
        (place / f"{part}.offsets.npy").is_file() for part in PARTS
    )


def open_part(place: Path, part: str) -> Tokens:
    """The memory-mapped shards of "train" or "val" in a store's folder.

    Raises ValueError for a shard that is not of the size its index states.
    """
    index = json.loads((place / _INDEX).read_text())
    dtype = np.dtype(index["dtype"])
    shards = []
    for i, tokens in enumerate(index["tokens"][part]):
        file = place / shard_name(part, i)
        size, stated = file.stat().st_size, tokens * dtype.itemsize
        if size != stated:
            raise ValueError(
                f"{file} must hold {stated:,} bytes, as its index states, but has {size:,}; remove the file and make it again."
            )
        shards.append(np.memmap(file, dtype=dtype, mode="r"))
    return Tokens(shards, np.load(place / f"{part}.offsets.npy"))
