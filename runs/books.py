"""The book corpus as token shards that travel: one tokenizer, shards of a few megabytes, compressed.

    python runs/books.py build --books BOOKS --out TOKENS      # books_{train_NN,val,test}.jsonl, {"text": ...} a line
    python runs/books.py pack --out TOKENS --to PACKED         # PACKED/{tokenizer.json, *.xz}, each shard below 16 MiB
    python runs/books.py journeys --packed PACKED --mib 10     # which files go together, a line a journey
    python runs/books.py unpack --packed PACKED --out TOKENS   # elsewhere: whatever shards are there, in order

`unpack` takes the shards from the first on as far as they are there, so that they may come in several journeys; what describes
them comes with the first, and a process that trains on what is there goes on with it undisturbed. A document never lies in two
shards. The tokenizer is trained on the training books alone.
"""

import argparse
import io
import json
import lzma
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from claims import alone

from mamba3.ops.state_file import replace_file
from mamba3.train.corpus import Corpus, SplitCorpus
from mamba3.train.store import Tokens, open_or_build, open_part, shard_name
from mamba3.train.tokenizer import FILE_NAME, load_tokenizer, train_bpe

PARTS = {"train": "books_train_*.jsonl", "val": "books_val.jsonl", "test": "books_test.jsonl"}
DESCRIPTION = ("index.json", "train.offsets.npy", "val.offsets.npy")  # of each part's shards
VOCABULARY, SHARD_TOKENS = 8192, 8_000_000


def build(books: Path, out: Path, vocabulary: int, shard_tokens: int) -> None:
    """Train the tokenizer and tokenise the three parts into out/{train,val,test}."""
    out.mkdir(parents=True, exist_ok=True)
    corpora = {name: SplitCorpus(Corpus(books, glob=glob), val_fraction=0, seed=0) for name, glob in PARTS.items()}
    if not (out / FILE_NAME).is_file():
        train_bpe(corpora["train"].training_texts(), vocabulary).save(str(out / FILE_NAME))
    tokenizer = load_tokenizer(out / FILE_NAME)
    for name, corpus in corpora.items():
        store = open_or_build(corpus, tokenizer, out / f".{name}", shard_tokens=shard_tokens)
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.move(out / f".{name}" / store.key, out / name)
        shutil.rmtree(out / f".{name}")
        size = corpus.bytes
        sys.stdout.write(f"{name}: {corpus.documents} books, {size:,} bytes, {store.train.targets:,} tokens\n")


def pack(out: Path, to: Path) -> None:
    """Compress every shard and copy what describes them; a shard is written when it is whole."""
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(out / FILE_NAME, to / FILE_NAME)

    def compress(name: str, file: Path) -> None:
        data = lzma.compress(
            file.read_bytes(), filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]
        )
        (to / f"{name}.{file.name}.xz").write_bytes(data)

    files = [(name, file) for name in PARTS for file in sorted((out / name).glob("train-*.bin"))]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: compress(*pair), files))
    for name in PARTS:
        for file in DESCRIPTION:
            shutil.copy(out / name / file, to / f"{name}.{file}")


def journeys(packed: Path, limit: int) -> list[list[Path]]:
    """The files of `pack` in journeys of at most `limit` bytes: what describes them, the held-out parts, training shards.

    Raises ValueError where a file alone, or all that describes them, is larger.
    """
    units = [[packed / FILE_NAME, *(packed / f"{name}.{file}" for name in PARTS for file in DESCRIPTION)]]
    units += [[file] for name in ("val", "test", "train") for file in sorted(packed.glob(f"{name}.*.xz"))]
    found: list[list[Path]] = [[]]
    for files in units:
        size = sum(file.stat().st_size for file in files)
        if size > limit:
            raise ValueError(
                f"a journey must hold {files[-1].name} and what belongs to it, {size:,} bytes; it is {limit:,}."
            )
        if sum(file.stat().st_size for file in found[-1]) + size > limit:
            found.append([])
        found[-1] += files
    return found


def unpack(packed: Path, out: Path) -> None:
    """Restore the parts in `out` from the shards that are in `packed`, and from those an earlier call brought."""
    described = out / "packed"  # what earlier journeys brought of it
    described.mkdir(parents=True, exist_ok=True)
    for file in (FILE_NAME, *(f"{name}.{file}" for name in PARTS for file in DESCRIPTION)):
        if (packed / file).is_file():
            replace_file(described / file, (packed / file).read_bytes())
        elif not (described / file).is_file():
            raise SystemExit(f"{packed} holds no {file}, which belongs to the first journey, and none came before.")
    with alone(out / ".lock"):
        replace_file(out / FILE_NAME, (described / FILE_NAME).read_bytes())
        for name in PARTS:
            _unpack_part(name, packed, described, out / name)


def _unpack_part(name: str, packed: Path, described: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    index = json.loads((described / f"{name}.index.json").read_text())
    offsets = np.load(described / f"{name}.train.offsets.npy")
    sizes: list[int] = []
    for i, size in enumerate(index["tokens"]["train"]):
        source, target = packed / f"{name}.{shard_name('train', i)}.xz", folder / shard_name("train", i)
        stated = size * np.dtype(index["dtype"]).itemsize
        if not _is_whole(target, stated) and source.is_file():
            partial = target.with_suffix(".partial")
            partial.write_bytes(lzma.decompress(source.read_bytes()))
            os.replace(partial, target)
        if not _is_whole(target, stated):
            break
        sizes.append(size)
    index["tokens"]["train"] = sizes
    replace_file(folder / "val.offsets.npy", (described / f"{name}.val.offsets.npy").read_bytes())
    held = io.BytesIO()
    np.save(held, offsets[offsets <= sum(sizes)])
    replace_file(folder / "train.offsets.npy", held.getvalue())
    replace_file(folder / "index.json", json.dumps(index).encode())
    sys.stdout.write(f"{name}: {len(sizes)} shards, {sum(sizes):,} tokens\n")


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def read(tokens: Path, part: str) -> Tokens:
    """The tokens of "train", "val" or "test" in what `build` or `unpack` wrote."""
    if not (tokens / part / "index.json").is_file():
        raise SystemExit(f"{tokens} holds no {part} tokens; make them with runs/books.py build or unpack.")
    with alone(tokens / ".lock"):  # not while `unpack` writes what belongs together
        found = open_part(tokens / part, "train")
    if not found.shards:
        raise SystemExit(f"of {part} no shard has come to {tokens} yet; unpack the journey that brings it.")
    return found


def some_shards(tokens: Tokens, first: int, last: int) -> Tokens:
    """The documents of shards first to last - 1 alone."""
    bounds = np.cumsum([0, *(len(shard) for shard in tokens.shards)])
    begin, end = bounds[first], bounds[min(last, len(tokens.shards))]
    offsets = tokens.offsets[(tokens.offsets >= begin) & (tokens.offsets <= end)]
    if first < 0 or len(offsets) < 2:
        raise SystemExit(f"shards {first} to {last} are none of the {len(tokens.shards)} that are there.")
    return Tokens(tokens.shards[first:last], offsets - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build", "pack", "journeys", "unpack"))
    parser.add_argument("--books", type=Path, help="folder of the books' JSON lines")
    parser.add_argument("--out", type=Path, default=Path("tokens"), help="folder of tokens")
    parser.add_argument("--to", type=Path, help="folder of compressed shards to write")
    parser.add_argument("--packed", type=Path, help="folder of compressed shards to read")
    parser.add_argument("--mib", type=float, default=10, help="of a journey at most")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS)
    options = parser.parse_args()
    needed = {"build": "books", "pack": "to", "journeys": "packed", "unpack": "packed"}[options.command]
    if getattr(options, needed) is None:
        parser.error(f"{options.command} needs --{needed}")
    if options.command == "build":
        build(options.books, options.out, options.vocabulary, options.shard_tokens)
    elif options.command == "pack":
        pack(options.out, options.to)
    elif options.command == "journeys":
        for files in journeys(options.packed, int(options.mib * 2**20)):
            sys.stdout.write(" ".join(map(str, files)) + "\n")
    else:
        unpack(options.packed, options.out)


if __name__ == "__main__":
    main()
