"""The paper's models by name (Appendix C and D; mathematics.md, section 8): {siso, mimo}-{180m, 440m, 880m, 1.5b}."""

from __future__ import annotations

from typing import Any

from mamba3.lm.config import Mamba3Config

# name: layers, d_model, inner channels of the MLP for SISO and for MIMO of rank 4 (the parameters match)
SIZES = {
    "180m": (12, 768, 1536, 1280),
    "440m": (24, 1024, 2048, 1792),
    "880m": (24, 1536, 3072, 2800),
    "1.5b": (24, 2048, 4096, 3824),
}
LLAMA_3_VOCABULARY = 128_256
PRESETS = tuple(f"{kind}-{size}" for kind in ("siso", "mimo") for size in SIZES)


def preset(name: str, **overrides: Any) -> Mamba3Config:
    """The configuration of a model of the paper, e.g. "mimo-180m"; any field can be overridden.

    The vocabulary is that of the published models unless given. ValueError for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
    kind, size = name.split("-", 1)
    depth, d_model, siso, mimo = SIZES[size]
    values: dict[str, Any] = {
        "vocab_size": LLAMA_3_VOCABULARY,
        "d_model": d_model,
        "layers": ("mamba3",) * depth,
        "d_intermediate": siso if kind == "siso" else mimo,
        "mimo_rank": 1 if kind == "siso" else 4,
    }
    return Mamba3Config.from_dict({**values, **overrides})
