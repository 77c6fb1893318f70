"""Layers of other libraries as models of a task: gated DeltaNet of flash-linear-attention, Mamba-2 of transformers.

Embedding, blocks of a norm and a mixer on a residual stream, a last norm, the embedding's transpose as the head: the
surroundings of `Mamba3LM`, with the library's layer and its own first weights in the middle.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from mamba3.nn import RMSNorm

PEERS = {"gdn": "fla", "mamba2": "transformers"}


def why_not(kind: str) -> str | None:
    """Why a peer cannot be built here; None where it can."""
    if kind not in PEERS:
        return f"a peer is one of {', '.join(PEERS)}; it is {kind!r}"
    if importlib.util.find_spec(PEERS[kind]) is None:
        return f"{PEERS[kind]} is not installed (pip install 'mamba3[peers]')"
    return None


class Peer(nn.Module):
    """(tokens [b, t], positions [b]) to logits [b, v] at those positions."""

    def __init__(self, kind: str, vocab_size: int, d_model: int, layers: int, d_state: int = 64, headdim: int = 64):
        super().__init__()
        reason = why_not(kind)
        if reason:
            raise ValueError(f"this model cannot be built: {reason}.")
        make = {"gdn": _gated_deltanet, "mamba2": _mamba2}[kind]
        # The kernels of gated DeltaNet take 16 bits alone.
        self.in_16_bits = kind == "gdn"
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in range(layers))
        self.mixers = nn.ModuleList(make(d_model, d_state, headdim, i) for i in range(layers))
        self.norm_f = RMSNorm(d_model)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.in_16_bits):
                y = mixer(norm(h))
            h = h + (y[0] if isinstance(y, tuple) else y).to(h.dtype)
        asked = h.gather(1, positions.view(-1, 1, 1).expand(-1, 1, h.shape[2])).squeeze(1)
        return self.norm_f(asked) @ self.embedding.weight.T


def _gated_deltanet(d_model: int, d_state: int, headdim: int, index: int) -> nn.Module:
    """Keys of d_state and values of headdim channels, expand 2, short convolution and gate as the library has them; beta in
    [0, 2], that is eigenvalues in [-1, 1]."""
    from fla.layers import GatedDeltaNet  # pyright: ignore[reportMissingImports]

    return GatedDeltaNet(
        hidden_size=d_model, head_dim=d_state, expand_v=headdim / d_state, num_heads=max(1, 2 * d_model // headdim),
        allow_neg_eigval=True, layer_idx=index, mode="chunk",
    )  # fmt: skip


def _mamba2(d_model: int, d_state: int, headdim: int, index: int) -> nn.Module:
    """The library's PyTorch path; its parameters A and D of the heads as Mamba-2 initialises them."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=d_model, state_size=d_state, expand=2, head_dim=headdim, num_heads=2 * d_model // headdim, n_groups=1,
        conv_kernel=4, chunk_size=32, num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    return Mamba2Mixer(config, layer_idx=index).eval()  # in training mode it asks for kernels that must be downloaded
