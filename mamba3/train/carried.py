"""The states that rows go on from, as a checkpoint's tensors: carry/<forward pass>/<layer>/<field>, and the tokens read."""

import torch

from mamba3.lm.state import LMState
from mamba3.ops.types import State

_PREFIX = "carry/"


def pack_carried(carried: dict[int, LMState]) -> dict[str, torch.Tensor]:
    """The tensors of each forward pass's rows."""
    packed = {}
    for number, state in carried.items():
        for i, layer in enumerate(state.layers):
            packed |= layer.tensors(f"{_PREFIX}{number}/{i}/")
    return packed


def empty_carried(stored: dict[str, torch.Tensor], numbers: list[int]) -> dict[str, torch.Tensor]:
    """Of the empty tensors of a checkpoint, the states of these forward passes."""
    return {key: v for key, v in stored.items() if key.startswith(_PREFIX) and int(key.split("/")[1]) in numbers}


def unpack_carried(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[int, LMState]:
    """The inverse of `pack_carried`."""
    layers: dict[int, dict[int, dict[str, torch.Tensor]]] = {}
    for key, value in tensors.items():
        _, number, layer, field = key.split("/")
        layers.setdefault(int(number), {}).setdefault(int(layer), {})[field] = value.to(device)
    states = {}
    for number, found in layers.items():
        made = [State(**found[i]) for i in sorted(found)]
        states[number] = LMState(made, torch.zeros(made[0].S.shape[0], dtype=torch.int64, device=device))  # type: ignore[arg-type]
    return states
