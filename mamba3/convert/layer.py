"""One layer between the official release and ours: the same parameters under the same names, but for the order of the
state channels (mathematics.md, section 2).

    rotated pairs, i < a:    official SISO (2i, 2i + 1)    official MIMO (i, i + n // 2)    ours (i, i + a)

The tensors whose n axis is permuted: the B and C rows of in_proj, both norm weights, both biases. Nothing is rounded, and
`layer_to_official` undoes `layer_from_official` bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mamba3.lm.model import check_weights
from mamba3.nn import Mamba3
from mamba3.ops.discretize import DECAYS

# What the official constructor takes, with its defaults. The numbers keep their names here; the flags do not.
NUMBERS: dict[str, float] = {
    "d_state": 128, "expand": 2, "headdim": 64, "ngroups": 1, "rope_fraction": 0.5, "mimo_rank": 4,
    "dt_min": 1e-3, "dt_max": 1e-1, "dt_init_floor": 1e-4, "A_floor": 1e-4,
}  # fmt: skip
FLAGS = ("is_mimo", "is_outproj_norm", "fuse_pregate_headwise_norm")
# How the official kernels run, not what they compute.
INERT = ("chunk_size", "layer_idx", "n_layer", "dropout", "device", "dtype")
DECAY_KEYS = ("decay", "decay_activation")
ROPE_FRACTIONS = (0.5, 1.0)
OUT_NORMS = {False: "none", True: "pre_gate_grouped"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PERMUTED = ("B_bias", "C_bias", "B_norm.weight", "C_norm.weight")


def layer_from_official(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Mamba3:
    """The layer that computes what the official one does with these weights.

    Args:
        config: the official constructor's arguments. `decay` (or `decay_activation`) names the activation of A,
            "heavy_tail" or "softplus"; chunk_size, layer_idx, n_layer, dropout, device and dtype have no effect.
        state_dict: the official layer's parameters under its names. They are copied.

    Returns:
        A `Mamba3` in the dtype and on the device of in_proj.weight; parameters of the recurrence are at least float32.

    Raises ValueError when the decay is not named, and names unknown arguments and tensors that are missing, unknown,
    misshapen or not finite.
    """
    decay = named_decay(config)
    if decay is None:
        raise ValueError(
            f"config must name the activation of A in 'decay', one of {', '.join(DECAYS)}. It cannot be guessed: layers "
            "were trained with either, and their parameters have the same names and shapes."
        )
    if "d_model" not in config:
        raise ValueError("config must have d_model.")
    arguments = layer_arguments({k: v for k, v in config.items() if k != "d_model"}, config["d_model"])
    weights = dict(state_dict)
    check_floating(weights, "The state dict")
    dtype = weights["in_proj.weight"].dtype if "in_proj.weight" in weights else None
    with torch.device("meta"):
        layer = Mamba3(config["d_model"], **arguments, decay=decay, dtype=dtype)
    check_weights(layer.state_dict(), weights, "The tensors of the state dict")
    layer = layer.to_empty(device=weights["in_proj.weight"].device)
    layer.load_state_dict(weights)
    take_official_order_(layer)
    return layer


def layer_to_official(layer: Mamba3) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `layer_from_official`: (constructor arguments and `decay`, a copy of the parameters).

    An official build that does not know `decay` ignores it and applies its own. ValueError names the settings of the
    layer that the official one does not have.
    """
    arguments = official_arguments(layer)
    weights = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    return arguments, {**weights, **reordered(weights, layer, official=True)}


def reordered(weights: Mapping[str, Tensor], layer: Mamba3, *, official: bool) -> dict[str, Tensor]:
    """Copies of those tensors that have an n axis, in the official order of state channels or, from there, in ours.

    layer: says which order that is; it need not hold the weights.
    """
    order = _official_channels(layer)
    copies = {name: weights[name].detach().clone() for name in ("in_proj.weight", *PERMUTED)}
    _permute_(copies, layer, torch.argsort(order) if official else order)
    return copies


def layer_arguments(config: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    """Our names for the official constructor's arguments; d_model and decay aside. ValueError names what is unknown."""
    unknown = sorted(set(config) - {*NUMBERS, *FLAGS, *INERT, *DECAY_KEYS})
    if unknown:
        raise ValueError(f"The official Mamba3 layer has no argument {', '.join(unknown)}.")
    values = {name: config.get(name, default) for name, default in NUMBERS.items()}
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number; it is {value!r}.")
    flags = {name: config.get(name, False) for name in FLAGS}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false; it is {value!r}.")
    if values["rope_fraction"] not in ROPE_FRACTIONS:
        raise ValueError(
            f"rope_fraction must be 0.5 or 1.0, as in the official layer; it is {values['rope_fraction']}."
        )
    if isinstance(d_model, int) and d_model > 0:
        # The official layer drops the fraction of expand * d_model.
        inner = int(values["expand"] * d_model)
        values["expand"] = values["expand"] if inner == values["expand"] * d_model else inner / d_model
    if not flags["is_mimo"]:
        values["mimo_rank"] = 1
    mimo = True if flags["is_mimo"] and values["mimo_rank"] == 1 else None
    return {**values, "mimo": mimo, "out_norm": OUT_NORMS[flags["is_outproj_norm"]]}


def official_arguments(layer: Mamba3) -> dict[str, Any]:
    """The official constructor's arguments and `decay`. ValueError names every setting it has no argument for."""
    fractions = {int(layer.d_state * f) // 2: f for f in ROPE_FRACTIONS}
    problems = {
        "lam is not learned": layer.lam != "learned",
        f"rotation is {layer.rotation}": layer.rotation != "data_dependent",
        f"{layer.pairs} of {layer.d_state // 2} pairs rotate, not half of them or all": layer.pairs not in fractions,
        f"out_norm is {layer.out_norm}": layer.out_norm not in OUT_NORMS.values(),
        "it has a short convolution": layer.d_conv > 0,
        "B or C has no bias": layer.B_bias is None or layer.C_bias is None,
    }
    named = [text for text, holds in problems.items() if holds]
    if named:
        raise ValueError(f"The official layer cannot express this one: {'; '.join(named)}.")
    expand = layer.d_inner / layer.d_model
    if int(expand * layer.d_model) < layer.d_inner:
        expand = math.nextafter(expand, math.inf)
    mimo = layer.mimo_x is not None
    dt_min, dt_max, dt_init_floor = layer.dt_range
    return {
        "d_model": layer.d_model, "d_state": layer.d_state, "expand": int(expand) if expand.is_integer() else expand,
        "headdim": layer.headdim, "ngroups": layer.ngroups, "rope_fraction": fractions[layer.pairs],
        "dt_min": dt_min, "dt_max": dt_max, "dt_init_floor": dt_init_floor, "A_floor": layer.A_floor,
        "is_outproj_norm": layer.out_norm == OUT_NORMS[True], "is_mimo": mimo,
        **({"mimo_rank": layer.mimo_rank} if mimo else {}), "decay": layer.decay,
    }  # fmt: skip


def decay_name(value: object) -> str:
    """The activation's name in `DECAYS`, however it is spelled (heavy-tail, HeavyTail). ValueError if it is another."""
    plain = str(value).lower().replace("-", "").replace("_", "").removesuffix("activation")
    for name in DECAYS:
        if plain == name.replace("_", ""):
            return name
    raise ValueError(f"The activation of A must be one of {', '.join(DECAYS)}; it is {value!r}.")


def named_decay(*configs: Mapping[str, Any]) -> str | None:
    """What the configurations name as the activation of A, or None. ValueError if they name two."""
    named = {decay_name(c[key]) for c in configs for key in DECAY_KEYS if c.get(key) is not None}
    if len(named) > 1:
        raise ValueError(f"The configuration names two activations of A, {' and '.join(sorted(named))}; keep one.")
    return named.pop() if named else None


def check_floating(weights: Mapping[str, Any], source: str) -> None:
    """ValueError names what is no tensor, or of a dtype that no layer computes in (as in a quantised checkpoint)."""
    odd = [
        f"{name} ({value.dtype if isinstance(value, Tensor) else type(value).__name__})"
        for name, value in weights.items()
        if not isinstance(value, Tensor) or value.dtype not in DTYPES
    ]
    if odd:
        shown = ", ".join(odd[:8]) + (f" and {len(odd) - 8} more" if len(odd) > 8 else "")
        raise ValueError(f"{source} must hold tensors of float64, float32, bfloat16 or float16; it has {shown}.")


def take_official_order_(layer: Mamba3) -> None:
    """Bring a layer that was filled with official weights, under their names, into our order of state channels."""
    _permute_(layer.state_dict(), layer, _official_channels(layer))


def _official_channels(layer: Mamba3) -> Tensor:
    """[n]: the official index of each of our state channels."""
    i, n = torch.arange(layer.pairs, device="cpu"), layer.d_state
    first, second = (i, i + n // 2) if layer.mimo_x is not None else (2 * i, 2 * i + 1)
    turned = torch.zeros(n, dtype=torch.bool)
    turned[first] = turned[second] = True
    return torch.cat([first, second, torch.arange(n)[~turned]])


@torch.no_grad()
def _permute_(weights: Mapping[str, Tensor], layer: Mamba3, order: Tensor) -> None:
    """Channel j of the n axis becomes what channel order[j] was, in place and a few rows at a time."""
    before = layer.splits.z + layer.splits.x
    rows = weights["in_proj.weight"][before : before + layer.splits.B + layer.splits.C].unflatten(
        0, (-1, order.numel())
    )
    order = order.to(rows.device)
    for vectors in rows:
        vectors.copy_(vectors[order])
    for name in PERMUTED:
        weights[name].copy_(weights[name][..., order])
