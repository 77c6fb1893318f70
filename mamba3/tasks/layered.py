"""Models of any mixers, each a module of its own: what peers and the recall runs are made of.

h = embedding;  h += mixer(RMSNorm(h)) for each mixer;  logits = embedding^T RMSNorm(h) at the positions asked for

the surroundings of `Mamba3LM` without an MLP. On a GPU a Mamba-3 layer of one rank runs by `mamba3.tasks.mixing_kernels`; law:
the layer itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba3.nn import Attention, Mamba3, RMSNorm, init


class Layered(nn.Module):
    """(tokens [b, t], positions [b] or [b, q]) to logits [b, v] or [b, q, v] at those positions.

    in_16_bits: run the mixers under autocast to bfloat16.
    """

    def __init__(self, mixers: Sequence[nn.Module], vocab_size: int, d_model: int, *, in_16_bits: bool = False):
        super().__init__()
        self.in_16_bits = in_16_bits
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in mixers)
        self.mixers = nn.ModuleList(mixers)
        self.norm_f = RMSNorm(d_model)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.in_16_bits):
                y = mixer(norm(h))
            h = h + (y[0] if isinstance(y, tuple) else y).to(h.dtype)
        places = positions if positions.ndim == 2 else positions.unsqueeze(1)
        asked = h.gather(1, places.unsqueeze(2).expand(-1, -1, h.shape[2]))
        return (self.norm_f(asked) @ self.embedding.weight.T).view(*positions.shape, -1)


class FusedMamba3(Mamba3):
    """The layer of one rank and one group, learned lambda and data-dependent rotation; in float32 by the mixing kernels."""

    def forward(
        self, u: Tensor, cu_seqlens: Tensor | list[int] | None = None, *, kernels: bool | None = None
    ) -> Tensor:
        """As Mamba3's, for whole sequences. kernels: None takes them on a GPU."""
        if not (u.is_cuda if kernels is None else kernels):
            return super().forward(u, cu_seqlens)
        from mamba3.tasks.coefficient_kernels import Coefficients, firsts_of
        from mamba3.tasks.mixing_kernels import Mixed, tf32

        assert cu_seqlens is None and self.B_bias is not None and self.C_bias is not None and self.D is not None
        row = self._project(u)
        if self.conv is not None:
            entering = torch.cat([row.x, row.B, row.C], dim=-1)
            mixed, _ = self.conv(entering, self.conv.init_state(u.shape[0], u.device, u.dtype))
            row = self._replace_conv(row, mixed)
        one, none = u.new_ones(1), u.new_zeros(1)
        raw = torch.cat([row.dt, row.A, row.lam, row.theta], dim=-1)[None]
        log_alpha, w, gamma, tick, theta = Coefficients.apply(
            raw, self.dt_bias[None], one, none, none, one * (self.decay == "heavy_tail"), self.A_floor, firsts_of(raw)
        )
        B, C = self.B_norm(row.B)[None], self.C_norm(row.C)[None]
        x, z = (v.unflatten(-1, (self.nheads, self.headdim))[None] for v in (row.x, row.z))
        y = Mixed.apply(
            x, B, C, z, theta, tick, none, u.new_zeros(theta.shape[-1]), log_alpha, w, gamma, self.B_bias[None, :, 0],
            self.C_bias[None, :, 0], self.D[None], tf32(),
        )  # fmt: skip
        return self.out_proj(y[0].flatten(-2))


class RotaryAttention(Attention):
    """Causal attention of rotary positions, base 10,000 (Llama's pairing of channels)."""

    def forward(self, u: Tensor, cu_seqlens: Tensor | list[int] | None = None) -> Tensor:
        """As Attention's, for whole sequences."""
        assert cu_seqlens is None
        q, k, v = (w.transpose(1, 2) for w in self._project(u))
        half = torch.arange(0, self.head_dim, 2, device=u.device) / self.head_dim
        angle = torch.arange(u.shape[1], device=u.device)[:, None] * 10_000.0**-half
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

        def turned(w: Tensor) -> Tensor:
            a, b = w.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        return self._out(F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True).transpose(1, 2))


# The mixers of a recall model's layers, and the width of the short convolution over Mamba-3's x, B and C.
RECALL: dict[str, tuple[tuple[str, ...], int]] = {
    "mamba3": (("mamba3", "mamba3"), 0),
    "mamba3-conv": (("mamba3", "mamba3"), 4),
    "hybrid": (("mamba3", "attention"), 0),
    "hybrid-conv": (("mamba3", "attention"), 4),
    "attention": (("rotary", "rotary"), 0),
    "mamba2": (("mamba2", "mamba2"), 4),
}
ATTENTION_HEAD = 32


def recall_model(kind: str, vocab_size: int, d_model: int, d_state: int = 64, headdim: int = 64) -> Layered:
    """Two layers for MQAR. In a hybrid the attention has no positions, as in the paper's; alone it has rotary ones."""
    if kind not in RECALL:
        raise ValueError(f"a recall model is one of {', '.join(RECALL)}; it is {kind!r}.")
    from mamba3.tasks.peers import Mamba2

    names, d_conv = RECALL[kind]
    heads = max(1, d_model // ATTENTION_HEAD)
    make = {
        "mamba3": lambda: FusedMamba3(d_model, d_state, headdim=headdim, rope_fraction=0.5, decay="softplus", d_conv=d_conv),
        "mamba2": lambda: Mamba2(d_model, d_state, headdim),
        "attention": lambda: Attention(d_model, heads),
        "rotary": lambda: RotaryAttention(d_model, heads),
    }  # fmt: skip
    mixers = [make[name]() for name in names]
    for mixer in mixers:
        init.residual_(mixer.out_proj, len(mixers))
    return Layered(mixers, vocab_size, d_model)
