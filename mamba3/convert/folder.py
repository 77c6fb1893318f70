"""One model folder from another: official, ours or transformers' in, any of them out, tensor by tensor.

A tensor is renamed and its state channels are put in order; its dtype is that of the source unless another is asked for.
Law: there and back is the identity, bit for bit. A conversion that fails leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.convert import files, hub, layouts
from mamba3.convert.checkpoint import read_model
from mamba3.convert.decay import DecayChoice
from mamba3.convert.layer import DTYPES
from mamba3.lm import Mamba3LM, shards
from mamba3.text.encode import find_end_of_text
from mamba3.text.settings import SETTINGS_FILE, write_settings

# Kept at float32 at least by a model in 16 bits (docs/numerics.md), so not rounded to 16 bits in its file either.
RECURRENT = ("dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")
CHECKED_TOKENS = 96


class Conversion(NamedTuple):
    """source, target: layouts. parameters: of the model. choice: the activation of A. tokenizer: the files carried along.

    difference: the largest absolute difference between the logits of both folders' models on a fixed input, computed in
    at least float32; None when it was not asked for. scale: the largest absolute logit of the source.
    """

    source: str
    target: str
    parameters: int
    choice: DecayChoice
    tokenizer: tuple[str, ...]
    difference: float | None
    scale: float | None


def convert_folder(
    source: str | Path,
    target: str | Path,
    layout: str = layouts.OURS,
    *,
    decay: str = "auto",
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> Conversion:
    """Write the model of a folder or of a repository of the hub into a new folder, in another layout or the same one.

    Args:
        source: a folder in any of the three layouts, or a repository of the Hugging Face hub that holds one.
        target: the folder to make; it must not exist or be empty, unless `overwrite` and it holds a model.
        layout: "official", "mamba3" or "transformers".
        decay: as for `load_official`.
        dtype: of the tensors; that of each in the source when None. Parameters of the recurrence are not rounded to 16 bits.
        max_shard_size: bytes, or a text such as "5GB"; larger weights are split, in safetensors, with an index.
        tokenizer: where the tokenizer is, when not beside the weights: a file, a folder or a repository of the hub.
        check: load what was written, and compare its logits with the source's.

    Raises:
        ValueError: an argument, the source or the tokenizer is not right, or `layout` cannot express the model.
        OSError: the hub does not give the files out, or the disk does not take them. The target is then as it was.
    """
    if layout not in layouts.LAYOUTS:
        raise ValueError(f"A layout is one of {', '.join(layouts.LAYOUTS)}; it is {layout!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16; it is {dtype}.")
    limit = None if max_shard_size is None else shards.parse_size(max_shard_size)
    target = Path(target)
    _check_target(target, overwrite)
    folder = hub.find_folder(source)
    if target.exists() and target.samefile(folder):
        raise ValueError(f"{target} is the source itself; give another folder to write to.")
    given = None if tokenizer is None else hub.find_tokenizer(tokenizer)
    values = files.read_json(folder / files.CONFIG_FILE)
    origin = layouts.layout_of(values, folder)
    stored, path = files.read_weights(folder)
    wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in stored.values())
    width = torch.float64 if wide else torch.float32
    model, choice, *_ = read_model(folder, decay, width, tokenizer=given)
    config = model.config
    beside = _tokenizer_files(given, folder)
    encoder = None
    if files.TOKENIZER_FILE in beside:
        encoder = files.read_tokenizer(beside[files.TOKENIZER_FILE])
        files.check_vocabulary(encoder, config, beside[files.TOKENIZER_FILE])
    weights = layouts.from_layout(origin, config, stored, path)
    if dtype is not None:
        weights = {name: value.to(_dtype(name, value, dtype)) for name, value in weights.items()}
    logits = _logits(model) if check else None
    parameters = model.num_parameters()
    del model, stored
    with _new_folder(target) as place:
        written = layouts.to_layout(layout, config, weights)
        _write_weights(place, layout, written, limit, tied=config.tie_embeddings)
        for name, file in beside.items():
            shutil.copyfile(file, place / name)
        end = None if encoder is None else find_end_of_text(encoder)
        if layout == layouts.TRANSFORMERS and encoder is not None and not (place / SETTINGS_FILE).exists():
            write_settings(place, encoder, end)
        said = layouts.config_values(layout, config, weights["embedding.weight"].dtype, eos_token_id=end)
        (place / files.CONFIG_FILE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        difference = scale = None
        if logits is not None:
            again = read_model(place, choice.decay, width).model
            difference, scale = (_logits(again) - logits).abs().max().item(), logits.abs().max().item()
    return Conversion(origin, layout, parameters, choice, tuple(beside), difference, scale)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not (target / files.CONFIG_FILE).is_file():
        raise ValueError(f"{target} exists and is no model folder; give a folder that does not exist or is empty.")
    if not overwrite:
        raise ValueError(f"{target} holds a model already; give another folder, or overwrite it (--overwrite).")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill beside `target`: it takes the place of `target` at the end, and is removed if the block raises."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        place = scratch / "new"
        place.mkdir()
        yield place
        if target.exists():
            os.replace(target, scratch / "old")
        os.replace(place, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_weights(folder: Path, layout: str, weights: dict[str, Tensor], limit: int | None, *, tied: bool) -> None:
    size = sum(
        value.numel() * value.element_size() for name, value in weights.items() if name != layouts.HEAD or not tied
    )
    if layout == layouts.OFFICIAL and (limit is None or size <= limit):
        torch.save(weights, folder / files.BIN_FILE)  # the one file that the official release reads
        return
    if tied:  # safetensors holds a tensor once; a reader ties the head by config.json
        weights = {name: value for name, value in weights.items() if name != layouts.HEAD}
    shards.write(folder, weights, limit)


def _dtype(name: str, value: Tensor, dtype: torch.dtype) -> torch.dtype:
    narrow = dtype.itemsize < torch.float32.itemsize
    if narrow and name.rsplit(".", 1)[-1] in RECURRENT:
        return value.dtype if value.dtype.itemsize < torch.float64.itemsize else torch.float32
    return dtype


def _tokenizer_files(given: Path | None, folder: Path) -> dict[str, Path]:
    """The files of the tokenizer by the names they shall have: the one given, else those that the source has."""
    if given is not None and given.name != files.TOKENIZER_FILE:
        return {files.TOKENIZER_FILE: given}
    place = folder if given is None else given.parent
    return {name: place / name for name in files.TOKENIZER_FILES if (place / name).is_file()}


def fixed_input(vocab_size: int) -> Tensor:
    """[1, 96] tokens that depend on nothing but the size of the vocabulary and are spread over all of it."""
    step = max(1, round(vocab_size * 0.6180339887498949))
    return (torch.arange(1, CHECKED_TOKENS + 1) * step % vocab_size).unsqueeze(0)


@torch.no_grad()
def _logits(model: Mamba3LM) -> Tensor:
    return model(fixed_input(model.config.vocab_size))
