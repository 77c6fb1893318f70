"""A corpus: documents in a fixed order, from a text file, a folder, JSON lines or a dataset, and what is held out of them.

Each file is one document; each line of a `.jsonl` or `.ndjson` file is one document. Law: the held-out documents depend
on the documents' contents, their share and the seed alone (not on the tokenizer), and equal documents are never divided.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mamba3.train.dataset import is_dataset, read_rows

JSON_LINES = (".jsonl", ".ndjson")


class Document(NamedTuple):
    """A text and where it came from (`file` or `file:line`)."""

    name: str
    text: str


class Corpus:
    """The documents of a path, in sorted order, read anew by each iteration.

    `path`: a text file, a folder (searched recursively; `glob` narrows the file names; hidden files are left out), a
    file of JSON lines, whose `field` holds the text, or a dataset (`mamba3.train.dataset`), whose `split` has a `field`.
    In a folder, files that are not UTF-8 text and empty ones are
    passed over and listed in `skipped`; a single file must be text. Raises ValueError where no document comes of it.
    """

    def __init__(self, path: str | Path, *, glob: str = "", field: str = "text", split: str = "train"):
        self.path, self.field, self.split = Path(path), field, split
        self.skipped: list[str] = []
        self.is_folder, self.dataset = False, str(path) if is_dataset(path) else None
        if self.dataset is not None:
            return
        if not self.path.exists():
            raise ValueError(
                f"a corpus must exist, but {self.path} does not; give a text file, a folder, JSON lines or hf:NAME."
            )
        self.is_folder = self.path.is_dir()
        if glob and not self.is_folder:
            raise ValueError(f"glob = {glob!r} chooses files of a folder, but {self.path} is a file; leave it out.")
        self.files = _files_of(self.path, glob) if self.is_folder else [self.path]

    def __iter__(self) -> Iterator[Document]:
        self.skipped = []
        if self.dataset is not None:
            rows = read_rows(self.dataset, field=self.field, split=self.split)
            yield from (Document(f"{self.dataset}[{i}]", text) for i, text in enumerate(rows) if text)
            return
        for file in self.files:
            name = file.relative_to(self.path).as_posix() if self.is_folder else file.name
            if file.suffix in JSON_LINES:
                yield from _json_lines(file, name, self.field)
                continue
            try:
                text = _decode(file.read_bytes(), str(file))
            except ValueError:
                if not self.is_folder:
                    raise
                text = ""
            if text:
                yield Document(name, text)
            else:
                self.skipped.append(name)


def _files_of(folder: Path, glob: str) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob(glob or "*"), key=lambda f: f.relative_to(folder).as_posix())
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(
            f"a folder must hold at least one file that matches, but {folder} has none for glob = {glob or '*'!r}; "
            "change the glob or the folder."
        )
    return files


def _decode(data: bytes, origin: str) -> str:
    """UTF-8 text of `data`, a byte order mark removed; ValueError for anything else."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a corpus must be UTF-8 text, but byte {error.start} of {origin} is 0x{data[error.start]:02x}; "
            "convert the file to UTF-8 or leave it out."
        ) from error
    if "\0" in text:
        raise ValueError(f"a corpus must be text, but {origin} is binary (it holds NUL bytes); leave it out.")
    return text


def _json_lines(file: Path, name: str, field: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"line {number} of {file}"
            text = _decode(line, where).strip()
            if not text:
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"every line must be one JSON object, but {where} is not: {error}.") from error
            if not isinstance(value, dict):
                raise ValueError(f"every line must be a JSON object, but {where} is a {type(value).__name__}.")
            if not isinstance(value.get(field), str):
                raise ValueError(
                    f"every JSON line must hold its text under {field!r}, but {where} has the keys "
                    f"{', '.join(map(repr, value)) or '(none)'}"
                    + (f", and {field!r} is a {type(value[field]).__name__}" if field in value else "")
                    + "; name the field that holds the text."
                )
            if any("\ud800" <= character <= "\udfff" for character in value[field]):
                raise ValueError(f"text must be Unicode, but {where} escapes half a surrogate pair; remove it.")
            if value[field]:
                yield Document(f"{name}:{number}", value[field])


class SplitCorpus:
    """A corpus whose documents are marked as training or held out.

    Whole documents are held out, in an order drawn from `seed`, until they make up `val_fraction` of the bytes. A corpus
    of one document (or of copies of one) is divided at a line end instead: its tail is held out. `contents` names the
    documents, `fingerprint` the documents as they are divided.
    """

    def __init__(self, corpus: Corpus, *, val_fraction: float, seed: int):
        self.corpus = corpus
        digests, sizes = [], []
        whole = hashlib.sha256()
        for document in corpus:
            data = document.text.encode()
            digest = hashlib.sha256(data).digest()
            whole.update(digest)
            digests.append(digest)
            sizes.append(len(data))
        if not digests:
            raise ValueError(
                f"a corpus must hold text, but {corpus.path} is empty; give one with at least one document."
            )
        self.contents = whole.hexdigest()
        self.fingerprint = f"{self.contents} {val_fraction} {seed}"
        self.documents, self.bytes = len(digests), sum(sizes)
        self._tail_fraction = 0.0
        if val_fraction > 0 and len(set(digests)) == 1:
            self._tail_fraction = val_fraction
            self._held_out = np.zeros(len(digests), dtype=bool)
        else:
            self._held_out = _hold_out(digests, np.array(sizes), val_fraction, seed)

    def __iter__(self) -> Iterator[tuple[Document, bool]]:
        """Every document with whether it is held out."""
        for document, held_out in zip(self.corpus, self._held_out, strict=True):
            if self._tail_fraction:
                head, tail = _cut_tail(document.text, self._tail_fraction)
                yield Document(f"{document.name} (head)", head), False
                yield Document(f"{document.name} (tail)", tail), True
            else:
                yield document, bool(held_out)

    def training_texts(self) -> Iterator[str]:
        return (document.text for document, held_out in self if not held_out)


def _hold_out(digests: list[bytes], sizes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Mask of the held-out documents. Equal documents share a group, and groups are taken whole."""
    held_out = np.zeros(len(digests), dtype=bool)
    if fraction == 0:
        return held_out
    groups: dict[bytes, list[int]] = {}
    for i, digest in enumerate(digests):
        groups.setdefault(digest, []).append(i)
    order = [list(groups.values())[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    target, taken = fraction * sizes.sum(), 0
    for members in order:
        size = int(sizes[members].sum())
        if taken + size <= 1.1 * target:
            held_out[members] = True
            taken += size
        if taken >= target:
            break
    if not taken:  # every document is larger than the share: the smallest one it is
        held_out[min(order, key=lambda members: int(sizes[members].sum()))] = True
    return held_out


def _cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """(head, tail) with head + tail = text, both non-empty, cut after a line where one ends near."""
    if len(text) < 2:
        raise ValueError(f"one document must have at least 2 characters to hold out its tail, but has {len(text)}.")
    wanted = min(max(int(len(text) * (1 - fraction)), 1), len(text) - 1)
    line_end = text.rfind("\n", wanted // 2, wanted) + 1
    cut = line_end or wanted
    return text[:cut], text[cut:]
