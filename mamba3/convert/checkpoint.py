"""Language models from any of the three layouts (`mamba3.convert.layouts`), in a folder or a repository of the hub."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mamba3.convert import files, hub, layouts
from mamba3.convert.decay import DecayChoice, choose_decay
from mamba3.convert.layer import DTYPES, decay_name, named_decay, take_official_order_
from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.ops.discretize import DECAYS
from mamba3.ops.state_file import replace_file

logger = logging.getLogger(__name__)


class Official(NamedTuple):
    """model: in our layout. choice: the activation of A, who named it, and both losses where it was measured."""

    model: Mamba3LM
    choice: DecayChoice


class Loaded(NamedTuple):
    """model, choice: see `Official`. layout: of the folder, one of `layouts.LAYOUTS`. folder: where the files are."""

    model: Mamba3LM
    choice: DecayChoice
    layout: str
    folder: Path


def load_official(
    path_or_repo: str | Path,
    decay: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
) -> Mamba3LM:
    """A language model from the published layout, SISO or MIMO, with attention layers or without.

    Args:
        path_or_repo: a local folder, or the id of a repository of the Hugging Face hub, as "owner/name".
        decay: the activation of A, "heavy_tail" or "softplus". "auto" takes what config.json names, or else measures the
            loss of both on the bundled sentences, which needs a tokenizer; what it took and by how much is logged, and
            `read_official` returns it.
        dtype: of the model; that of the file when None. Parameters of the recurrence are at least float32.
        device: the CPU when None.
        tokenizer: a tokenizer or the path of its tokenizer.json; the one in the folder when None.

    Raises:
        ValueError: a file is missing or damaged; the configuration has unknown or unsupported settings; tensors are
            missing, unknown, misshapen or not finite (all by name); or the decay is neither named nor measurable.
        OSError: the hub does not answer or has no such repository.
    """
    return read_official(path_or_repo, decay, dtype, device, tokenizer=tokenizer).model


def read_official(
    path_or_repo: str | Path,
    decay: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
) -> Official:
    """`load_official`, with what was found out about the decay."""
    folder = hub.find_folder(path_or_repo)
    values = files.read_json(folder / files.CONFIG_FILE)
    if "layers" in values:
        raise ValueError(f"{folder} is not in the official layout but in ours: use Mamba3LM.from_pretrained.")
    return Official(*_read(folder, layouts.OFFICIAL, decay, dtype, device, tokenizer))


def read_model(
    path_or_repo: str | Path,
    decay: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
) -> Loaded:
    """A language model from any of the three layouts. The arguments, and what is raised, as for `load_official`.

    Only the official layout can leave the activation of A open; for the others `decay` "auto" is what config.json says.
    """
    folder = hub.find_folder(path_or_repo)
    layout = layouts.layout_of(files.read_json(folder / files.CONFIG_FILE), folder)
    model, choice = _read(folder, layout, decay, dtype, device, tokenizer)
    return Loaded(model, choice, layout, folder)


def save_official(model: Mamba3LM, folder: str | Path) -> None:
    """Write a model in the published layout, config.json and pytorch_model.bin, each atomically.

    ssm_cfg.decay names the activation of A, which `load_official` heeds; an official build ignores it and applies its
    own. ValueError names the settings that the official model does not have.
    """
    values = layouts.config_values(layouts.OFFICIAL, model.config, model.embedding.weight.dtype)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    weights = layouts.to_layout(layouts.OFFICIAL, model.config, state)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    replace_file(folder / files.BIN_FILE, buffer.getvalue())
    replace_file(folder / files.CONFIG_FILE, (json.dumps(values, indent=2) + "\n").encode())


def _read(
    folder: Path,
    layout: str,
    decay: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    tokenizer: Tokenizer | str | Path | None,
) -> tuple[Mamba3LM, DecayChoice]:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16; it is {dtype}.")
    decay = decay if decay == "auto" else decay_name(decay)
    values = files.read_json(folder / files.CONFIG_FILE)
    if layout == layouts.OFFICIAL:
        ssm = values.get("ssm_cfg")
        named = named_decay(values, ssm if isinstance(ssm, dict) else {})
        config = layouts.config_from(layout, values, named or next(iter(DECAYS)))
    else:
        config = layouts.config_from(layout, values, "")
        named = decay_name(config.decay)
    encoder = None
    if decay == "auto" and named is None:
        encoder = _tokenizer(tokenizer, folder)
        if encoder is None:
            raise ValueError(
                f"The weights in {folder} do not tell which activation of A they were trained with, and there is no "
                f"tokenizer to measure it with. Give decay, one of {', '.join(DECAYS)}, or tokenizer, the path of the "
                f"model's {files.TOKENIZER_FILE}."
            )
    weights, path = files.read_weights(folder)
    model = _fill(config, layouts.our_names(layout, config, weights, path), dtype, device or "cpu")
    if layout == layouts.OFFICIAL:
        for mixer in layouts.mixers(model).values():
            take_official_order_(mixer)
    if encoder is not None:
        choice = choose_decay(model, encoder)
    elif decay == "auto":
        assert named is not None
        choice = DecayChoice(named, "config.json")
    else:
        choice = DecayChoice(decay, "argument")
        if named not in (None, decay):
            logger.warning("%s names the decay %s; the argument %s is taken instead", folder, named, decay)
    for mixer in layouts.mixers(model).values():
        mixer.decay = choice.decay
    model.config = dataclasses.replace(config, decay=choice.decay)
    return model, choice


def _tokenizer(tokenizer: Tokenizer | str | Path | None, folder: Path) -> Tokenizer | None:
    """The tokenizer given, or from the place given, or of the folder, or None."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer is not None:
        return files.read_tokenizer(hub.find_tokenizer(tokenizer))
    file = folder / files.TOKENIZER_FILE
    return files.read_tokenizer(file) if file.is_file() else None


def _fill(
    config: Mamba3Config, weights: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device | str
) -> Mamba3LM:
    """A model made of weights under our names. Beside the file, only the model itself takes memory."""
    model = layouts.skeleton(config, dtype or weights["embedding.weight"].dtype).to_empty(device=device)
    model.load_state_dict(weights)
    return model
