"""The files of an official checkpoint: config.json, the weights in any of four layouts, and a tokenizer.json perhaps."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

CONFIG_FILE, BIN_FILE, TOKENIZER_FILE = "config.json", "pytorch_model.bin", "tokenizer.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", BIN_FILE, f"{BIN_FILE}.index.json")
PATTERNS = ([CONFIG_FILE, TOKENIZER_FILE, "*.safetensors", "*.safetensors.index.json"], ["*.bin", "*.bin.index.json"])
# What torch.load raises on damaged bytes depends on which byte it stumbles over.
DAMAGE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


def find_folder(path_or_repo: str | Path) -> Path:
    """A local folder as it is, or else the files of a repository of the Hugging Face hub, downloaded or from its cache.

    ValueError when it is neither; OSError, with what to do, when the hub does not answer or has no such repository.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds it and its {CONFIG_FILE}.")
    repo = str(path_or_repo)
    if isinstance(path_or_repo, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo):
        raise ValueError(f"{repo} is neither a folder nor the id of a repository of the Hugging Face hub (owner/name).")
    try:
        for patterns in PATTERNS:
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
            if any((folder / name).is_file() for name in WEIGHT_FILES):
                break
    except (OSError, ValueError) as error:
        raise OSError(
            f"{repo} is no folder here, and could not be had from the Hugging Face hub: {error} Check the name, the "
            "network, and for a private or gated repository the login (hf auth login); or download the files elsewhere "
            "and give their folder."
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError names a file that is missing or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is not an official checkpoint: it has no {path.name}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(values).__name__}.")
    return values


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a checkpoint by their official names, and the file that lists them.

    They are mapped from the disk where the format allows, so that memory is taken only by what is made of them.
    """
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return (_read_shards(path) if name.endswith(".json") else _read_tensors(path)), path
    raise ValueError(f"{folder} has no weights; there should be one of {', '.join(WEIGHT_FILES)}.")


def read_tokenizer(tokenizer: Tokenizer | str | Path | None, folder: Path) -> Tokenizer | None:
    """The tokenizer given, or from the file given, or of the folder, or None. ValueError names a damaged file."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    path = folder / TOKENIZER_FILE if tokenizer is None else Path(tokenizer)
    if tokenizer is None and not path.is_file():
        return None
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"There is no tokenizer at {path}; give the path of a {TOKENIZER_FILE}.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers (0.23) raises plain Exception for every fault of a file
        raise ValueError(f"{path} is not a tokenizer of the tokenizers library: {error}.") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from the names of tensors to those of files.")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name}, which is not beside it.")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing; download it too.")
        weights.update(_read_tensors(index.parent / name))
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated: {error}.") from error
    try:
        # A file of the older format, or a truncated one, is no zip file and cannot be mapped.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except DAMAGE as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{path} is damaged, truncated, or holds more than tensors: {reason}.") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors; it holds a {type(weights).__name__}.")
    return weights
