"""The book corpus as token shards that travel: one tokenizer, shards of a few megabytes, compressed.

    python runs/books.py build --books BOOKS --out TOKENS      # books_{train_NN,val,test}.jsonl, {"text": ...} a line
    python runs/books.py pack --out TOKENS --to PACKED         # PACKED/{tokenizer.json, *.xz}, each shard below 16 MiB
    python runs/books.py unpack --packed PACKED --out TOKENS   # elsewhere: whatever shards are there, in order

`unpack` takes the shards from the first on as far as they are there, so that they may come in several journeys; a document
never lies in two shards. The tokenizer is trained on the training books alone.
"""

import argparse
import json
import lzma
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mamba3.train.corpus import Corpus, SplitCorpus
from mamba3.train.store import Tokens, open_or_build, open_part, shard_name
from mamba3.train.tokenizer import FILE_NAME, load_tokenizer, train_bpe

PARTS = {"train": "books_train_*.jsonl", "val": "books_val.jsonl", "test": "books_test.jsonl"}
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
        for file in ("index.json", "train.offsets.npy", "val.offsets.npy"):
            shutil.copy(out / name / file, to / f"{name}.{file}")


def unpack(packed: Path, out: Path) -> None:
    """Restore the parts in `out` from the shards that are in `packed`, and from those an earlier call brought."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(packed / FILE_NAME, out / FILE_NAME)
    for name in PARTS:
        folder = out / name
        folder.mkdir(exist_ok=True)
        shutil.copy(packed / f"{name}.val.offsets.npy", folder / "val.offsets.npy")
        index = json.loads((packed / f"{name}.index.json").read_text())
        offsets = np.load(packed / f"{name}.train.offsets.npy")
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
        (folder / "index.json").write_text(json.dumps(index))
        np.save(folder / "train.offsets.npy", offsets[offsets <= sum(sizes)])
        sys.stdout.write(f"{name}: {len(sizes)} shards, {sum(sizes):,} tokens\n")


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def read(tokens: Path, part: str) -> Tokens:
    """The tokens of "train", "val" or "test" in what `build` or `unpack` wrote."""
    if not (tokens / part / "index.json").is_file():
        raise SystemExit(f"{tokens} holds no {part} tokens; make them with runs/books.py build or unpack.")
    return open_part(tokens / part, "train")


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
    parser.add_argument("command", choices=("build", "pack", "unpack"))
    parser.add_argument("--books", type=Path, help="folder of the books' JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder of tokens")
    parser.add_argument("--to", type=Path, help="folder of compressed shards to write")
    parser.add_argument("--packed", type=Path, help="folder of compressed shards to read")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS)
    options = parser.parse_args()
    needed = {"build": "books", "pack": "to", "unpack": "packed"}[options.command]
    if getattr(options, needed) is None:
        parser.error(f"{options.command} needs --{needed}")
    if options.command == "build":
        build(options.books, options.out, options.vocabulary, options.shard_tokens)
    elif options.command == "pack":
        pack(options.out, options.to)
    else:
        unpack(options.packed, options.out)


if __name__ == "__main__":
    main()
