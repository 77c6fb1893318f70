"""The optional causal depthwise convolution in front of the recurrence (Table 5a), with state and packing."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConv(nn.Module):
    """silu(sum_k weight_k * v_{t - width + 1 + k} + bias) for each channel; rows before a sequence come from its state.

    v [b, t, c]; state [s, width - 1, c], the last rows read, oldest first.
    """

    def __init__(self, channels: int, width: int, device=None, dtype=None):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(width), as PyTorch initialises a depthwise convolution."""
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def init_state(self, batch_size: int, device=None, dtype=None) -> Tensor:
        """Rows of zeros: nothing was read."""
        return torch.zeros(batch_size, self.width - 1, self.weight.shape[0], device=device, dtype=dtype)

    def forward(self, v: Tensor, state: Tensor, cu_seqlens: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """The convolved rows, and the state after the last of each sequence."""
        state, halo = state.to(v.dtype), self.width - 1
        if cu_seqlens is None:
            return self._slide(torch.cat([state, v], dim=1)), torch.cat([state, v[:, -halo:]], dim=1)[:, -halo:].clone()
        lengths = [b - a for a, b in itertools.pairwise(cu_seqlens)]
        pieces = v[0].split(lengths)
        extended = [torch.cat(pair) for pair in zip(state, pieces, strict=True)]
        rows = [self._slide(rows.unsqueeze(0)) for rows in extended]
        return torch.cat(rows, dim=1), torch.stack([rows[-halo:] for rows in extended])

    def step(self, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One row [b, c]."""
        window = torch.cat([state.to(v.dtype), v.unsqueeze(1)], dim=1)
        return self._slide(window).squeeze(1), window[:, 1:]

    def _slide(self, rows: Tensor) -> Tensor:
        weight, bias = self.weight.to(rows.dtype), self.bias.to(rows.dtype)
        y = F.conv1d(rows.transpose(1, 2), weight.unsqueeze(1), bias, groups=weight.shape[0])
        return F.silu(y.transpose(1, 2))
