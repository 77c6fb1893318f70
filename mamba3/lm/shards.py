"""Weights on disk in safetensors: one file, or several with an index that names the file of each tensor.

    model.safetensors       or       model-00001-of-00003.safetensors ...  +  model.safetensors.index.json

The layout is the Hugging Face hub's. Law: what `read` returns is what `write` was given, bit for bit, whatever the limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mamba3.ops.state_file import replace_file

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes: a number, or a text such as "5GB" (decimal) or "500MiB" (binary). ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) * UNITS[match[2]] < 1:
        raise ValueError(f"A shard's size is a positive number of bytes, or one such as 5GB or 500MiB; it is {size!r}.")
    return int(float(match[1]) * UNITS[match[2]])


def plan(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """The names of each shard's tensors, in the order given; a tensor larger than the limit has a shard of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and limit is not None and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str | None = None) -> None:
    """Write the tensors into `folder`, each file atomically, and remove what an earlier `write` left of another split."""
    sizes = {name: value.numel() * value.element_size() for name, value in tensors.items()}
    shards = plan(sizes, None if max_shard_size is None else parse_size(max_shard_size))
    stem, suffix = WEIGHTS_FILE.split(".")
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WEIGHTS_FILE]
    for file, names in zip(files, shards, strict=True):
        part = {name: tensors[name].detach().cpu().contiguous() for name in names}
        replace_file(folder / file, save(part, metadata={"format": "pt"}))
    kept = set(files)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        replace_file(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
        kept.add(INDEX_FILE)
    # A reader that finds two splits would have to guess which is the newer one.
    for path in folder.iterdir():
        if path.name not in kept and (path.name in (WEIGHTS_FILE, INDEX_FILE) or SHARD.fullmatch(path.name)):
            path.unlink()


def find(folder: Path) -> Path | None:
    """The file that `read` starts from, or None when the folder holds no weights in safetensors."""
    return next((folder / name for name in (WEIGHTS_FILE, INDEX_FILE) if (folder / name).is_file()), None)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of an index. ValueError names the file that is missing or damaged."""
    if path.suffix == ".json":
        return {name: value for file in shard_files(path) for name, value in read(file).items()}
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}. Download or copy it again.") from error


def shard_files(index: Path) -> list[Path]:
    """The files that an index names, all there. ValueError when one is missing, elsewhere, or the index is no index."""
    try:
        values: Any = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} is damaged: it is not JSON ({error}).") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from the names of tensors to those of files.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name}, which is not beside it.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names {', '.join(missing)}, which is missing; download or copy it too.")
    return [index.parent / name for name in names]
