"""Tokens on disk: one flat memory-mapped file for training, one for validation, with the documents' offsets.

A document is stored as end-of-text, its tokens, end-of-text: the first lets a model begin a document, the second lets
it end one. A store is found again by a key of the corpus's contents, the split and the tokenizer; another key rebuilds.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mamba3.train.corpus import Document, SplitCorpus
from mamba3.train.folder import new_folder
from mamba3.train.tokenizer import encode, end_of_text

_FORMAT = 1
_GROUP_BYTES = 4 << 20  # documents are encoded in groups of about this size
PARTS = ("train", "val")


@dataclass(frozen=True)
class Tokens:
    """Documents end to end. `offsets` [documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all of a document but its first."""
        return len(self.tokens) - self.documents


@dataclass(frozen=True)
class TokenStore:
    """The two parts of a tokenised corpus, memory-mapped, and the key that they were built from."""

    train: Tokens
    val: Tokens
    key: str


def store_key(corpus: SplitCorpus, tokenizer: Tokenizer) -> str:
    return hashlib.sha256(f"{_FORMAT}\n{corpus.fingerprint}\n{tokenizer.to_str()}".encode()).hexdigest()[:16]


def open_or_build(
    corpus: SplitCorpus, tokenizer: Tokenizer, folder: Path, on_progress: Callable[[int, int], None] | None = None
) -> TokenStore:
    """The store of this corpus and tokenizer under `folder`, tokenised now unless it is there; others are removed.

    Raises OSError, with nothing left behind, if it cannot be written.

    `on_progress(bytes done, bytes in all)` is told how far tokenising is.
    """
    key = store_key(corpus, tokenizer)
    place = folder / key
    if not _is_whole(place):
        try:
            with new_folder(place) as building:
                _build(corpus, tokenizer, building, on_progress)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the tokens could not be written to {place} ({error.strerror}) and nothing was left there; a corpus of "
                f"{corpus.bytes:,} bytes takes at most {4 * corpus.bytes:,}: free some space or take another folder",
            ) from error
    for other in folder.iterdir():
        if other != place:
            shutil.rmtree(other, ignore_errors=True)
    return TokenStore(_open(place, "train"), _open(place, "val"), key)


def _build(
    corpus: SplitCorpus, tokenizer: Tokenizer, folder: Path, on_progress: Callable[[int, int], None] | None
) -> None:
    separator = end_of_text(tokenizer)
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size(with_added_tokens=True) <= 1 << 16 else np.uint32)
    offsets: dict[str, list[int]] = {part: [0] for part in PARTS}
    done = 0
    with ExitStack() as stack:
        files = {part: stack.enter_context((folder / f"{part}.bin").open("wb")) for part in PARTS}
        for group in _groups(corpus):
            encoded = encode(tokenizer, [document.text for document, _ in group])
            for (document, held_out), ids in zip(group, encoded, strict=True):
                part = "val" if held_out else "train"
                stored = np.concatenate([[separator], ids, [separator]]).astype(dtype)
                files[part].write(stored.tobytes())
                offsets[part].append(offsets[part][-1] + len(stored))
                done += len(document.text.encode())
            if on_progress is not None:
                on_progress(done, corpus.bytes)
    for part in PARTS:
        np.save(folder / f"{part}.offsets.npy", np.array(offsets[part], dtype=np.int64))
    sizes = {part: offsets[part][-1] for part in PARTS}
    (folder / "index.json").write_text(json.dumps({"dtype": dtype.name, "tokens": sizes}))


def _groups(corpus: Iterable[tuple[Document, bool]]) -> Iterable[list[tuple[Document, bool]]]:
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
    index = place / "index.json"
    if not index.is_file():
        return False
    stated = json.loads(index.read_text())
    width = np.dtype(stated["dtype"]).itemsize
    files = {place / f"{part}.bin": stated["tokens"][part] * width for part in PARTS}
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items()) and all(
        (place / f"{part}.offsets.npy").is_file() for part in PARTS
    )


def _open(place: Path, part: str) -> Tokens:
    dtype = np.dtype(json.loads((place / "index.json").read_text())["dtype"])
    offsets = np.load(place / f"{part}.offsets.npy")
    if offsets[-1] == 0:  # an empty file cannot be mapped
        return Tokens(np.empty(0, dtype), offsets)
    return Tokens(np.memmap(place / f"{part}.bin", dtype=dtype, mode="r"), offsets)
