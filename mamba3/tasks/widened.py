"""Mamba-3 models that differ in settings of one equation, as models of one shape: the widest, with switches.

A rotation that is fixed or absent, a fixed lambda and biases that are left out leave parameters out; here they are there, as
zeros that nothing reads, so that the weights of all kinds stack. Law: `narrowed` is the inverse of `widened`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mamba3.lm import Mamba3Config

# What may differ between the models of a stack; everything else in their configurations is the same.
SWITCHES = ("rotation", "lam", "B_bias", "C_bias", "decay")


class Switches(NamedTuple):
    """Of each model, [m] of the parameters' dtype: turns (1: angles by data), rope (1: standard RoPE), fixed (1: lam is
    `lam`), lam, heavy (1: heavy-tail decay)."""

    turns: Tensor
    rope: Tensor
    fixed: Tensor
    lam: Tensor
    heavy: Tensor


@dataclass(frozen=True)
class Sizes:
    """Of one model: layers, heads, p, n, r, pairs (a), padded vocabulary, tokens, smallest decay rate, eps of the norms."""

    layers: int
    heads: int
    p: int
    n: int
    r: int
    pairs: int
    vocab: int
    answers: int
    A_floor: float
    eps: float

    @classmethod
    def of(cls, config: Mamba3Config) -> Sizes:
        """Those of a configuration. ValueError where it has what this computation lacks."""
        missing = [
            what
            for what, has in {
                "attention layers": set(config.layers) != {"mamba3"}, "an MLP": config.d_intermediate > 0,
                "a short convolution": config.d_conv > 0, "an output norm": config.out_norm != "none",
                "groups": config.ngroups > 1, "a head of its own": not config.tie_embeddings,
                "frozen biases": not config.bc_bias_trainable,
            }.items()
            if has
        ]  # fmt: skip
        if missing:
            raise ValueError(f"folded models are plain Mamba-3 blocks; this one has {', '.join(missing)}: use Stack.")
        heads = round(config.expand * config.d_model) // config.headdim
        pairs = int(config.d_state * config.rope_fraction) // 2
        return cls(
            len(config.layers), heads, config.headdim, config.d_state, config.mimo_rank, pairs,
            config.padded_vocab_size, config.vocab_size, config.A_floor, config.norm_eps,
        )  # fmt: skip


def switches(configs: list[Mamba3Config], device: torch.device | str, dtype: torch.dtype) -> Switches:
    """Those of each model. ValueError where the models differ in anything else."""
    shapes = {tuple(v for k, v in c.to_dict().items() if k not in SWITCHES) for c in configs}
    if len(shapes) > 1:
        raise ValueError(f"models of a stack may differ in {', '.join(SWITCHES)} alone; these differ in more.")

    def column(f) -> Tensor:
        return torch.tensor([float(f(c)) for c in configs], device=device, dtype=dtype)

    return Switches(
        column(lambda c: c.rotation == "data_dependent"), column(lambda c: c.rotation == "standard"),
        column(lambda c: c.lam != "learned"), column(lambda c: 0.5 if c.lam == "learned" else c.lam),
        column(lambda c: c.decay == "heavy_tail"),
    )  # fmt: skip


def widened(config: Mamba3Config, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's weights with zeros for what its configuration leaves out, and of each weight which entries exist (1)."""
    sizes, wide, exist = Sizes.of(config), {}, {}
    h, inner = sizes.heads, sizes.heads * sizes.p
    for name, value in weights.items():
        there = torch.ones_like(value)
        if name.endswith("in_proj.weight"):
            kept = _kept_rows(config, sizes, value.device)
            there = kept.to(value.dtype).unsqueeze(1).expand(-1, value.shape[1])
            value = value.new_zeros(len(kept), value.shape[1]).index_copy(0, kept.nonzero().squeeze(1), value)
        wide[name], exist[name] = value, there.contiguous()
    for i in range(sizes.layers):
        for bias in ("B_bias", "C_bias"):
            name = f"layers.{i}.mixer.{bias}"
            if name not in wide:
                wide[name] = exist[name] = weights["norm_f.weight"].new_zeros(h, sizes.r, sizes.n)
    assert wide["layers.0.mixer.in_proj.weight"].shape[0] == 2 * inner + 2 * sizes.r * sizes.n + 3 * h + sizes.pairs
    return wide, exist


def narrowed(config: Mamba3Config, wide: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `widened`: what Mamba3LM.from_weights takes."""
    sizes, weights = Sizes.of(config), {}
    for name, value in wide.items():
        if name.endswith("in_proj.weight"):
            value = value[_kept_rows(config, sizes, value.device)]
        absent = getattr(config, name.rpartition(".")[2], 0) is None
        if not absent:
            weights[name] = value.contiguous()
    return weights


def _kept_rows(config: Mamba3Config, sizes: Sizes, device: torch.device) -> Tensor:
    """Which rows of the wide in_proj the configuration has."""
    kept = torch.ones(2 * sizes.heads * sizes.p + 2 * sizes.r * sizes.n + 3 * sizes.heads + sizes.pairs, device=device)
    if config.lam != "learned":
        kept[len(kept) - sizes.pairs - sizes.heads : len(kept) - sizes.pairs] = 0
    if config.rotation != "data_dependent":
        kept[len(kept) - sizes.pairs :] = 0
    return kept > 0
