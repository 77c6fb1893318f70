"""The files of a checkpoint: config.json, the weights in any of four layouts, and those of a tokenizer perhaps."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mamba3.lm import Mamba3Config, shards

CONFIG_FILE, BIN_FILE, TOKENIZER_FILE = "config.json", "pytorch_model.bin", "tokenizer.json"
WEIGHT_FILES = (shards.WEIGHTS_FILE, shards.INDEX_FILE, BIN_FILE, f"{BIN_FILE}.index.json")
# What makes up a tokenizer in the hub's layout; only the first is read here, the rest is for transformers.
TOKENIZER_FILES = (
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
# What torch.load raises on damaged bytes depends on which byte it stumbles over.
DAMAGE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError names a file that is missing or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path.parent} is no model: it has no {path.name}. Give the folder that holds {path.name} and the weights."
        ) from error
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
    raise ValueError(f"{folder} has no weights; there should be one of {', '.join(WEIGHT_FILES)}. Copy them there.")


def read_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. ValueError names a damaged file."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers (0.23) raises plain Exception for every fault of a file
        raise ValueError(f"{file} is not a tokenizer of the tokenizers library: {error}.") from error


def check_vocabulary(tokenizer: Tokenizer, config: Mamba3Config, source: object) -> None:
    """ValueError when the tokenizer has a token for which the model has no embedding."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.padded_vocab_size:
        raise ValueError(
            f"A tokenizer must not have more tokens than its model, but that of {source} goes up to token {largest} and the "
            f"model has embeddings for {config.padded_vocab_size}; give the tokenizer that the model was trained with."
        )


def _read_shards(index: Path) -> dict[str, Tensor]:
    return {name: value for file in shards.shard_files(index) for name, value in _read_tensors(file).items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return shards.read(path)
    try:
        # A file of the older format, or a truncated one, is no zip file and cannot be mapped.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except DAMAGE as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{path} is damaged, truncated, or holds more than tensors: {reason}.") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors; it holds a {type(weights).__name__}.")
    return weights
