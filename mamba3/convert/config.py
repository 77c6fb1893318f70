"""The configuration of an official language model (its config.json), to ours and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mamba3.convert.layer import DECAY_KEYS, layer_arguments, official_arguments
from mamba3.lm import Mamba3Config, Mamba3LM
from mamba3.nn import Mamba3

# The fields of the official configuration, with its defaults; None: there is none that fits a Mamba-3.
FIELDS: dict[str, Any] = {
    "d_model": None, "n_layer": None, "vocab_size": None, "d_intermediate": 0, "ssm_cfg": None, "attn_layer_idx": (),
    "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}  # fmt: skip
FLAGS = ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings")
# What libraries note in a config.json beside the model's own fields.
BOOKKEEPING = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
ATTENTION_FIELDS: dict[str, Any] = {
    "num_heads": None, "num_heads_kv": None, "head_dim": None, "mlp_dim": 0, "qkv_proj_bias": True,
    "out_proj_bias": True, "softmax_scale": None, "causal": False, "d_conv": 0, "rotary_emb_dim": 0,
    "rotary_emb_base": 10000.0, "rotary_emb_interleaved": False, "layer_idx": None, "device": None, "dtype": None,
}  # fmt: skip
NORM_EPS = 1e-5


def config_from_official(values: Mapping[str, Any], decay: str) -> Mamba3Config:
    """Our configuration of an official model. ValueError names what is unknown, missing or not supported."""
    unknown = sorted(set(values) - {*FIELDS, *BOOKKEEPING, *DECAY_KEYS})
    if unknown:
        ours = " It looks like one of ours: use Mamba3LM.from_pretrained." if "layers" in values else ""
        raise ValueError(f"The official configuration has no field {', '.join(unknown)}.{ours}")
    needed = [name for name in ("d_model", "n_layer", "vocab_size", "ssm_cfg") if values.get(name) is None]
    if needed:
        raise ValueError(f"The official configuration must have {', '.join(needed)}.")
    values = {**FIELDS, **{name: value for name, value in values.items() if value is not None}}
    for name in FLAGS:
        if not isinstance(values[name], bool):
            raise ValueError(f"{name} must be true or false; it is {values[name]!r}.")
    for name in ("d_model", "n_layer", "vocab_size", "d_intermediate"):
        value, least = values[name], int(name != "d_intermediate")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; it is {value!r}.")
    for name in ("ssm_cfg", "attn_cfg"):
        if not isinstance(values[name], Mapping):
            raise ValueError(f"{name} must be an object; it is {values[name]!r}.")
    if not values["rms_norm"]:
        raise ValueError("rms_norm is false: models with LayerNorm are not supported, only those with RMSNorm.")
    ssm = dict(values["ssm_cfg"])
    layer = ssm.pop("layer", "Mamba1, the official default")
    if layer != "Mamba3":
        raise ValueError(f"ssm_cfg.layer is {layer}: this converts models of Mamba3 layers.")
    layers, attention = _layers(values), {}
    if "attention" in layers:
        attention = _attention(values["attn_cfg"], values["d_model"])
    ours = {
        "vocab_size": values["vocab_size"], "d_model": values["d_model"], "layers": layers,
        "d_intermediate": values["d_intermediate"], **layer_arguments(ssm, values["d_model"]), "decay": decay,
        **attention, "norm_eps": NORM_EPS, "residual_in_fp32": values["residual_in_fp32"],
        "tie_embeddings": values["tie_embeddings"], "pad_vocab_multiple": values["pad_vocab_size_multiple"],
    }  # fmt: skip
    return Mamba3Config.from_dict(ours)


def config_to_official(model: Mamba3LM) -> dict[str, Any]:
    """The inverse of `config_from_official`, the decay in ssm_cfg. ValueError names what the official model lacks."""
    config = model.config
    if config.norm_eps != NORM_EPS:
        raise ValueError(f"The official model's norms have eps {NORM_EPS}; norm_eps is {config.norm_eps}.")
    mixer = next((module for module in model.modules() if isinstance(module, Mamba3)), None)
    ssm = {} if mixer is None else official_arguments(mixer)
    ssm.pop("d_model", None)
    attention = [i for i, kind in enumerate(config.layers) if kind == "attention"]
    heads = {
        "causal": True, "num_heads": config.attn_heads, "num_heads_kv": config.attn_kv_heads,
        "head_dim": config.attn_head_dim, "qkv_proj_bias": config.attn_qkv_bias, "out_proj_bias": config.attn_out_bias,
    }  # fmt: skip
    return {
        "d_model": config.d_model, "d_intermediate": config.d_intermediate, "n_layer": len(config.layers),
        "vocab_size": config.vocab_size, "ssm_cfg": {"layer": "Mamba3", **ssm}, "attn_layer_idx": attention,
        "attn_cfg": heads if attention else {}, "rms_norm": True, "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True, "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    }  # fmt: skip


def _layers(values: Mapping[str, Any]) -> tuple[str, ...]:
    depth, attention = values["n_layer"], values["attn_layer_idx"]
    fits = isinstance(attention, list | tuple) and all(isinstance(i, int) and 0 <= i < depth for i in attention)
    if not fits:
        raise ValueError(f"attn_layer_idx must list layers from 0 to {depth - 1}; it is {attention!r}.")
    return tuple("attention" if i in attention else "mamba3" for i in range(depth))


def _attention(given: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    """Our fields of the official attention's arguments."""
    unknown = sorted(set(given) - set(ATTENTION_FIELDS))
    if unknown:
        raise ValueError(f"The official attention has no argument {', '.join(unknown)}; attn_cfg has.")
    values = {**ATTENTION_FIELDS, **given}
    for name in ("num_heads", "num_heads_kv", "head_dim"):
        value = values[name]
        if not (isinstance(value, int) and value > 0) and (value is not None or name == "num_heads"):
            raise ValueError(f"attn_cfg.{name} must be a positive integer; it is {value!r}.")
    for name in ("qkv_proj_bias", "out_proj_bias"):
        if not isinstance(values[name], bool):
            raise ValueError(f"attn_cfg.{name} must be true or false; it is {values[name]!r}.")
    head_dim = values["head_dim"] or d_model // values["num_heads"]
    scale = values["softmax_scale"]
    problems = {
        "causal is not true (its default is false)": values["causal"] is not True,
        f"d_conv is {values['d_conv']}": values["d_conv"] != 0,
        f"rotary_emb_dim is {values['rotary_emb_dim']}": values["rotary_emb_dim"] != 0,
        f"mlp_dim is {values['mlp_dim']}": values["mlp_dim"] != 0,
        f"softmax_scale is {scale}": scale is not None and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-9),
    }
    named = [text for text, holds in problems.items() if holds]
    if named:
        raise ValueError(
            f"attn_cfg is not supported: {'; '.join(named)}. Attention here is causal, without convolution, positions or "
            "an MLP of its own, and scaled by 1 / sqrt(head_dim)."
        )
    return {
        "attn_heads": values["num_heads"], "attn_kv_heads": values["num_heads_kv"], "attn_head_dim": values["head_dim"],
        "attn_qkv_bias": values["qkv_proj_bias"], "attn_out_bias": values["out_proj_bias"],
    }  # fmt: skip
