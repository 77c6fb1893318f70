"""The rows of Table 5b that this package can build, as configurations of one language model.

Of each kind the paper states layers (1 for parity, 3 for arithmetic), d_model (32 or 64) and N = 64. What it leaves unsaid is
chosen here: P = 64, half of the state's channels rotate, no MLP in a Mamba block, softplus decay (A near 0 is needed to
keep a parity, which the heavy tail reaches only far out), and for the Transformer heads of 32 channels, no positions, an MLP.
"""

from __future__ import annotations

from typing import Any

from mamba3.lm import Mamba3Config

KINDS: dict[str, dict[str, Any]] = {
    "mamba3": {},
    "mamba3-mimo": {"mimo_rank": 4},
    "mamba3-rope": {"rotation": "standard"},
    "mamba3-norotation": {"rotation": "none"},
    "mamba3-euler": {"lam": 1.0},
    "mamba3-trapezoid": {"lam": 0.5},
    "mamba3-nobias": {"B_bias": None, "C_bias": None},
    "mamba3-heavytail": {"decay": "heavy_tail"},
    "mamba3-allturn": {"rope_fraction": 1.0},
    "transformer": {"d_intermediate": 128},
}
LAYERS = {"parity": 1, "mqar": 2}
OTHER_LAYERS = 3


def model_config(
    task: str, vocab_size: int, kind: str, *, d_model: int = 32, layers: int | None = None, **fields: Any
) -> Mamba3Config:
    """The configuration of `kind` for a task; `fields` are those of Mamba3Config and win. ValueError names the kinds."""
    if kind not in KINDS:
        raise ValueError(f"a model is one of {', '.join(KINDS)}; it is {kind!r}.")
    count = layers or LAYERS.get(task, OTHER_LAYERS)
    values: dict[str, Any] = {"d_state": 64, "headdim": 64, "rope_fraction": 0.5, "decay": "softplus"}
    if kind == "transformer":
        values["attn_heads"] = max(1, d_model // 32)
    pattern = ("attention" if kind == "transformer" else "mamba3",) * count
    values |= KINDS[kind] | fields
    return Mamba3Config(vocab_size=vocab_size, d_model=d_model, layers=pattern, **values)
