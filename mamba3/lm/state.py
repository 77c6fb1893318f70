"""The state of a language model: one state a layer, whatever the number of tokens read, and a file to keep it in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba3.nn.cache import AttentionState
from mamba3.ops import State, state_file

if TYPE_CHECKING:
    from mamba3.lm.model import Mamba3LM

LayerState = State | AttentionState


@dataclass
class LMState:
    """layers: the state of each block. tokens [b] int64: how many tokens each sequence has read.

    fingerprint names the weights that made the state; a state continued by other weights means nothing. It is None in a
    state made under torch.compile, and `save` then asks for the model.
    """

    layers: list[LayerState]
    tokens: Tensor
    fingerprint: str | None = field(default=None)

    def _map(self, f: Callable, tokens: Tensor) -> LMState:
        return LMState([f(layer) for layer in self.layers], tokens, self.fingerprint)

    @property
    def batch_size(self) -> int:
        """Sequences held."""
        return self.tokens.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors; constant in the number of tokens but for attention layers."""
        return sum(layer.nbytes for layer in self.layers) + self.tokens.nbytes

    def select(self, index: Tensor | Iterable[int]) -> LMState:
        """The states of some sequences, in the order given; an index may repeat (beams, forks)."""
        index = torch.as_tensor(index, device=self.tokens.device)
        return self._map(lambda layer: layer.select(index), self.tokens.index_select(0, index))

    def row(self, index: int) -> LMState:
        """The state of one sequence, which shares this one's memory."""
        rows = slice(index, index + 1)
        return self._map(lambda layer: layer.part(rows), self.tokens[rows])

    def trim(self, used: int) -> LMState:
        """The same states when the longest sequence is known to have `used` tokens: caches without room for longer ones."""
        return self._map(lambda layer: layer.trim(used) if isinstance(layer, AttentionState) else layer, self.tokens)

    @classmethod
    def cat(cls, states: Sequence[LMState]) -> LMState:
        """The sequences of several states in one, in order; caches of different lengths get equal room. A copy."""
        layers = [type(parts[0]).cat(parts) for parts in zip(*(state.layers for state in states), strict=True)]
        return cls(layers, torch.cat([state.tokens for state in states]), states[0].fingerprint)

    def detach(self) -> LMState:
        """The same tensors, cut off from the graph that made them."""
        return self._map(lambda layer: layer.detach(), self.tokens)

    def clone(self) -> LMState:
        """A copy that shares no memory with this one: a fork."""
        return self._map(lambda layer: layer.clone(), self.tokens.clone())

    def to(self, device: torch.device | str) -> LMState:
        """The same state on another device."""
        return self._map(lambda layer: layer.to(device), self.tokens.to(device))

    def save(self, path: str | Path, model: Mamba3LM | None = None) -> None:
        """Write the state to a safetensors file: atomic, with a checksum, the model's fingerprint and the token counts.

        Raises OSError when it cannot be written (the file that was there is untouched), and ValueError when the state
        does not know its model and none is given.
        """
        fingerprint = model.fingerprint() if model is not None else self.fingerprint
        if fingerprint is None:
            raise ValueError(
                "This state was made under torch.compile and does not know its model; save(path, model=...)."
            )
        counts = ",".join(str(n) for n in self.tokens.tolist())
        dtype = str(self.layers[0].tensors()["x_prev" if isinstance(self.layers[0], State) else "k"].dtype)
        state_file.write(path, self.tensors(), kind="model", fingerprint=fingerprint, token_counts=counts, dtype=dtype)

    @classmethod
    def load(cls, path: str | Path, model: Mamba3LM | None = None, device: torch.device | str | None = None) -> LMState:
        """Read a state written by `save`; with `model`, onto its device, and only if these weights made it.

        Raises ValueError when the file is truncated, altered, no state, or of another model.
        """
        if model is not None and device is None:
            device = model.embedding.weight.device
        tensors, metadata = state_file.read(path, kind="model", device=device)
        fingerprint = metadata.get("fingerprint")
        if model is not None and fingerprint != model.fingerprint():
            raise ValueError(
                f"{path} is the state of another model or of other weights: it was made by {fingerprint}, this model is "
                f"{model.fingerprint()}. Load the weights that made it."
            )
        return cls.from_tensors(tensors, fingerprint)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Everything held, by name: what a state file holds."""
        tensors = {prefix + "tokens": self.tokens}
        for i, layer in enumerate(self.layers):
            tensors.update(layer.tensors(f"{prefix}layers.{i}."))
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], fingerprint: str | None, prefix: str = "") -> LMState:
        """The inverse of `tensors`; names without the prefix are passed over."""
        fields: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"{prefix}layers."):
                number, field_name = name.removeprefix(f"{prefix}layers.").split(".")
                fields.setdefault(int(number), {})[field_name] = value
        layers: list[LayerState] = []
        for number in sorted(fields):
            values = fields[number]
            layers.append(State(**values) if "S" in values else AttentionState(**values, used=values["k"].shape[1]))
        return cls(layers, tensors[prefix + "tokens"], fingerprint)
