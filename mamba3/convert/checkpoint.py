"""Language models in the published layout: config.json beside pytorch_model.bin or safetensors (mathematics.md, section 9)."""

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

from mamba3.convert import files
from mamba3.convert.config import config_from_official, config_to_official
from mamba3.convert.decay import DecayChoice, choose_decay
from mamba3.convert.layer import (
    DTYPES,
    check_floating,
    decay_name,
    layer_to_official,
    named_decay,
    take_official_order_,
)
from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.lm.model import check_weights
from mamba3.nn import Mamba3
from mamba3.ops.discretize import DECAYS
from mamba3.ops.state_file import replace_file

logger = logging.getLogger(__name__)

HEAD, PREFIX = "lm_head.weight", "backbone."
EMBEDDING = PREFIX + "embedding.weight"


class Official(NamedTuple):
    """model: in our layout. choice: the activation of A, who named it, and both losses where it was measured."""

    model: Mamba3LM
    choice: DecayChoice


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
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16; it is {dtype}.")
    decay = decay if decay == "auto" else decay_name(decay)
    folder = files.find_folder(path_or_repo)
    values = files.read_json(folder / files.CONFIG_FILE)
    ssm = values.get("ssm_cfg")
    named = named_decay(values, ssm if isinstance(ssm, dict) else {})
    config = config_from_official(values, named or next(iter(DECAYS)))
    encoder = None
    if decay == "auto" and named is None:
        encoder = files.read_tokenizer(tokenizer, folder)
        if encoder is None:
            raise ValueError(
                f"The weights in {folder} do not tell which activation of A they were trained with, and there is no "
                f"tokenizer to measure it with. Give decay, one of {', '.join(DECAYS)}, or tokenizer, the path of the "
                f"model's {files.TOKENIZER_FILE}."
            )
    model = _fill(config, *files.read_weights(folder), dtype, device or "cpu")
    if encoder is not None:
        choice = choose_decay(model, encoder)
    elif decay == "auto":
        assert named is not None
        choice = DecayChoice(named, "config.json")
    else:
        choice = DecayChoice(decay, "argument")
        if named not in (None, decay):
            logger.warning("%s names the decay %s; the argument %s is taken instead", folder, named, decay)
    for mixer in _mixers(model).values():
        mixer.decay = choice.decay
    model.config = dataclasses.replace(config, decay=choice.decay)
    return Official(model, choice)


def save_official(model: Mamba3LM, folder: str | Path) -> None:
    """Write a model in the published layout, config.json and pytorch_model.bin, each atomically.

    ssm_cfg.decay names the activation of A, which `load_official` heeds; an official build ignores it and applies its
    own. ValueError names the settings that the official model does not have.
    """
    values = config_to_official(model)
    weights = {_official_name(name): value.detach().cpu() for name, value in model.state_dict().items()}
    for name, mixer in _mixers(model).items():
        _, permuted = layer_to_official(mixer)
        weights.update({f"{PREFIX}{name}.{key}": value.cpu() for key, value in permuted.items()})
    if model.config.tie_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    replace_file(folder / files.BIN_FILE, buffer.getvalue())
    replace_file(folder / files.CONFIG_FILE, (json.dumps(values, indent=2) + "\n").encode())


def _official_name(name: str) -> str:
    return name if name == HEAD else PREFIX + name


def _mixers(model: Mamba3LM) -> dict[str, Mamba3]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Mamba3)}


def _fill(
    config: Mamba3Config, weights: dict[str, Tensor], path: Path, dtype: torch.dtype | None, device: torch.device | str
) -> Mamba3LM:
    """A model made of official weights. Beside the file, only the model itself takes memory."""
    check_floating(weights, str(path))
    head = weights.pop(HEAD, None) if config.tie_embeddings else None
    if head is not None:
        # Writers that store shared tensors once may have kept either name.
        weights.setdefault(EMBEDDING, head)
    if EMBEDDING in weights:
        dtype = dtype or weights[EMBEDDING].dtype
    with torch.device("meta"):
        model = Mamba3LM(config, dtype=dtype)
    expected = model.state_dict()
    check_weights({_official_name(name): value for name, value in expected.items()}, weights, f"The tensors of {path}")
    if head is not None and (head.dtype != weights[EMBEDDING].dtype or not torch.equal(head, weights[EMBEDDING])):
        raise ValueError(
            f"The tensors of {path} do not fit its {files.CONFIG_FILE}: tie_embeddings is true, but {HEAD} differs from "
            f"{EMBEDDING}."
        )
    model = model.to_empty(device=device)
    model.load_state_dict({name: weights[_official_name(name)] for name in expected})
    for mixer in _mixers(model).values():
        take_official_order_(mixer)
    return model
