"""What every implementation takes and returns.

The state of a layer is four tensors whose size does not depend on how many tokens were read (mathematics.md, section 4):
the cumulative angle, the matrix state, and the last token's rotated B and its x, which the trapezoid of the next token
needs. The law that tests hold it to: prefill(a + b) = prefill(b, state of prefill(a)), for every split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.ops import state_file


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that coefficients, angles and states are kept in beside inputs of `dtype`: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which the recurrence computes in the dtypes it chose itself."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def transformed(v: Tensor) -> bool:
    """Whether v is inside torch.vmap or another torch.func transform: it stands for a batch of tensors, which neither a
    checkpoint can store nor a kernel address."""
    return not torch.compiler.is_compiling() and torch.func.debug_unwrap(v, recurse=False) is not v


class State(NamedTuple):
    """The whole memory of one layer after any number of tokens.

    phi: [b, h, a] cumulative angle in radians, in [-pi, pi]; float32 (float64 for float64 inputs).
    S: [b, h, p, n] matrix state, in the frame where B is rotated by phi; float32 or float64 likewise.
    B_prev: [b, r, h, n] the last token's B, with its bias and rotated by phi; dtype of the inputs.
    x_prev: [b, h, p] the last token's x, before mimo_x; dtype of the inputs.
    conv: [b, d_conv - 1, channels] the last rows that entered the layer's short convolution, when it has one. The
        recurrence carries it along and never reads it.
    """

    phi: Tensor
    S: Tensor
    B_prev: Tensor
    x_prev: Tensor
    conv: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        *,
        nheads: int,
        headdim: int,
        d_state: int,
        pairs: int,
        rank: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token. `dtype` is that of the inputs; phi and S are at least float32."""
        dtype = dtype or torch.get_default_dtype()
        wide = wide_dtype(dtype)
        return cls(
            phi=torch.zeros(batch_size, nheads, pairs, device=device, dtype=wide),
            S=torch.zeros(batch_size, nheads, headdim, d_state, device=device, dtype=wide),
            B_prev=torch.zeros(batch_size, rank, nheads, d_state, device=device, dtype=dtype),
            x_prev=torch.zeros(batch_size, nheads, headdim, device=device, dtype=dtype),
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        """The state with `f` applied to each tensor."""
        conv = None if self.conv is None else f(self.conv)
        return State(f(self.phi), f(self.S), f(self.B_prev), f(self.x_prev), conv)

    def select(self, index: Tensor | Iterable[int]) -> State:
        """The states of some sequences, in the order given; an index may repeat (beams, forks)."""
        index = torch.as_tensor(index, device=self.S.device)
        return self.map(lambda v: v.index_select(0, index))

    def part(self, rows: slice) -> State:
        """The states of sequences that lie side by side, in this one's memory."""
        return self.map(lambda v: v[rows])

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """The sequences of several states of one layer, in order. A copy."""
        fields = [[v for v in parts if v is not None] for parts in zip(*states, strict=True)]
        return State(*(torch.cat(parts) if parts else None for parts in fields))  # pyright: ignore[reportArgumentType]

    def detach(self) -> State:
        """The same tensors, cut off from the graph that made them."""
        return self.map(Tensor.detach)

    def clone(self) -> State:
        """A copy that shares no memory with this one."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str) -> State:
        """The same state on another device."""
        return self.map(lambda v: v.to(device))

    def where(self, rows: Tensor, other: State) -> State:
        """This state in some sequences, rows [b] of bool, and `other` in those left out."""
        fields = [
            None if mine is None or theirs is None else torch.where(rows.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)
            for mine, theirs in zip(self, other, strict=True)
        ]
        return State(*fields)  # pyright: ignore[reportArgumentType]

    def copy_(self, other: State) -> State:
        """Overwrite this state's tensors with those of `other`."""
        for mine, theirs in zip(self, other, strict=True):
            if mine is not None and theirs is not None and mine is not theirs:
                mine.copy_(theirs)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(v.nbytes for v in self if v is not None)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The fields that are present, by name: what a state file holds."""
        return {prefix + name: v for name, v in zip(self._fields, self, strict=True) if v is not None}

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, atomically, with a checksum. See `mamba3.ops.state_file`."""
        state_file.write(path, self.tensors(), kind="layer", dtype=str(self.x_prev.dtype))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> State:
        """Read a state written by `save`. ValueError when the file is truncated, altered or something else."""
        tensors, _ = state_file.read(path, kind="layer", device=device)
        missing = [name for name in cls._fields[:4] if name not in tensors]
        if missing:
            raise ValueError(f"{path} is not the state of one layer: it lacks {', '.join(missing)}.")
        return cls(*(tensors[name] for name in cls._fields[:4]), conv=tensors.get("conv"))


class ScanOutput(NamedTuple):
    """y: [b, t, h, p] after the gate, or [b, t, r, h, p] without one. state: after the last token of each sequence."""

    y: Tensor
    state: State


class Inputs(NamedTuple):
    """Arguments of the recurrence after validation; shapes and meaning in `mamba3.ops.scan`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    lam: Tensor
    theta: Tensor
    B: Tensor
    C: Tensor
    B_bias: Tensor | None = None
    C_bias: Tensor | None = None
    mimo_x: Tensor | None = None
    D: Tensor | None = None
    tick: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(self.x.dtype)

    @property
    def rank(self) -> int:
        return self.B.shape[-3]


class Gate(NamedTuple):
    """Arguments of the output stage; shapes and meaning in `mamba3.ops.gate`."""

    z: Tensor | None = None
    mimo_z: Tensor | None = None
    mimo_o: Tensor | None = None
    norm: str = "none"
    norm_weight: Tensor | None = None
