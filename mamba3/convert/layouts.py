"""Three layouts of a language model on disk, and one in memory: names, the order of state channels, the configuration.

    official       backbone.*, the release's order of state channels, config.json with ssm_cfg (mathematics.md, section 9)
    mamba3         the names and the order of `Mamba3LM`, config.json with the fields of `Mamba3Config`
    transformers   the same tensors; config.json has model_type "mamba3_lm" and transformers' own fields besides

Nothing is rounded on the way: a tensor keeps the dtype that it has in its file. Law: `to_layout` undoes `from_layout`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba3.convert.config import config_from_official, config_to_official
from mamba3.convert.layer import check_floating, reordered
from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.lm.config import ARCHITECTURE, FOREIGN, MODEL_TYPE
from mamba3.lm.model import check_weights
from mamba3.nn import Mamba3

OFFICIAL, OURS, TRANSFORMERS = LAYOUTS = ("official", "mamba3", "transformers")
HEAD, PREFIX = "lm_head.weight", "backbone."
EMBEDDING = PREFIX + "embedding.weight"
FIELDS = {field.name for field in dataclasses.fields(Mamba3Config)}
# transformers' names for fields of ours, and what it writes beside a model's fields.
ALIASES = {"hidden_size": "d_model", "tie_word_embeddings": "tie_embeddings"}
FOREIGN_TOO = ("num_labels", "quantization_config", "sep_token_id", "task_specific_params")


def layout_of(values: Mapping[str, Any], folder: Path) -> str:
    """The layout of a folder with these values in its config.json. ValueError when it is no Mamba-3 language model."""
    if values.get("model_type") == MODEL_TYPE:
        return TRANSFORMERS
    if "layers" in values:
        return OURS
    if {"ssm_cfg", "n_layer"} & set(values):
        return OFFICIAL
    named = values.get("model_type") or values.get("architectures")
    what = f"it is of {named}" if named else "it has none of ssm_cfg, layers and model_type"
    raise ValueError(
        f"{folder} holds no Mamba-3 language model that this mamba3 knows, by its config.json: {what}. Known are the "
        f"official layout (ssm_cfg), ours (layers) and that of transformers (model_type {MODEL_TYPE!r})."
    )


def config_from(layout: str, values: Mapping[str, Any], decay: str) -> Mamba3Config:
    """The configuration that config.json holds; `decay` is of the official layout, which need not name one."""
    if layout == OFFICIAL:
        return config_from_official(values, decay)
    if layout == OURS:
        return Mamba3Config.from_dict(dict(values))
    ours = {ALIASES.get(name, name): value for name, value in values.items()}
    unknown = sorted(
        name for name in ours if name not in FIELDS | {*FOREIGN, *FOREIGN_TOO} and not name.startswith("_")
    )
    if unknown:
        raise ValueError(
            f"config.json has unknown fields: {', '.join(unknown)}. The file may be of a newer mamba3 (then upgrade it: "
            "pip install --upgrade mamba3) or of another model."
        )
    return Mamba3Config.from_dict({name: value for name, value in ours.items() if name in FIELDS})


def config_values(layout: str, config: Mamba3Config, dtype: torch.dtype, **tokens: int | None) -> dict[str, Any]:
    """What config.json holds in a layout. `tokens` (eos_token_id, ...) are told to transformers.

    ValueError names the settings that the official model does not have.
    """
    if layout == OFFICIAL:
        return config_to_official(skeleton(config))
    if layout == OURS:
        return config.to_dict()
    about = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "dtype": str(dtype).removeprefix("torch.")}
    return {**about, **{name: token for name, token in tokens.items() if token is not None}, **config.to_dict()}


def skeleton(config: Mamba3Config, dtype: torch.dtype | None = None) -> Mamba3LM:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return Mamba3LM(config, dtype=dtype)


def mixers(model: Mamba3LM) -> dict[str, Mamba3]:
    """The Mamba-3 layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Mamba3)}


def our_names(layout: str, config: Mamba3Config, weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file under our names, in the order of state channels that they have there.

    ValueError names tensors that are missing, unknown, misshapen or not finite, as the file calls them.
    """
    check_floating(weights, str(path))
    weights, prefix = dict(weights), PREFIX if layout == OFFICIAL else _common_prefix(weights)
    embedding = prefix + "embedding.weight"
    head = weights.pop(HEAD, None) if config.tie_embeddings else None
    if head is not None:
        # Writers that store shared tensors once may have kept either name.
        weights.setdefault(embedding, head)
    expected = skeleton(config).state_dict()
    names = {name: name if name == HEAD else prefix + name for name in expected}
    check_weights({names[name]: value for name, value in expected.items()}, weights, f"The tensors of {path}")
    if head is not None and (head.dtype != weights[embedding].dtype or not torch.equal(head, weights[embedding])):
        raise ValueError(
            f"The tensors of {path} do not fit its config.json: tie_embeddings is true, but {HEAD} differs from {embedding}."
        )
    return {name: weights[theirs] for name, theirs in names.items()}


def from_layout(layout: str, config: Mamba3Config, weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file as `Mamba3LM` names and orders them, in the file's dtypes. ValueError as for `our_names`."""
    ours = our_names(layout, config, weights, path)
    return _reordered(config, ours, official=False) if layout == OFFICIAL else ours


def to_layout(layout: str, config: Mamba3Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `Mamba3LM` as a layout names and orders them. A tied head is there in the official one alone."""
    if layout != OFFICIAL:
        return dict(weights)
    theirs = {
        name if name == HEAD else PREFIX + name: value
        for name, value in _reordered(config, weights, official=True).items()
    }
    return {**theirs, HEAD: theirs[EMBEDDING]} if config.tie_embeddings else theirs


def _reordered(config: Mamba3Config, weights: Mapping[str, Tensor], *, official: bool) -> dict[str, Tensor]:
    result = dict(weights)
    for name, mixer in mixers(skeleton(config)).items():
        of_layer = {key: weights[f"{name}.{key}"] for key in mixer.state_dict()}
        result.update({f"{name}.{key}": v for key, v in reordered(of_layer, mixer, official=official).items()})
    return result


def _common_prefix(weights: Mapping[str, Tensor]) -> str:
    """What a class that holds the model as a part puts before our names ("model."); most often nothing."""
    return next((name.removesuffix("embedding.weight") for name in weights if name.endswith("embedding.weight")), "")
