"""Recipes by name, and the configuration file: how a model is trained, and its shape, in one JSON value.

    {"recipe": "paper-180m", "model": {"preset": "mimo-180m", "d_state": 64}, "steps": 2000, "lr": 2e-3}

`recipe` is optional; `model` holds a preset's name, `layers` (a number, or a list of kinds), `attention_every` and fields
of `Mamba3Config`; everything else is a field of `TrainConfig`. The paper's recipes are those of arXiv 2603.15569,
appendix D, which follows Dao & Gu 2024, D.2: AdamW (0.9, 0.95), decay 0.1, clip 1.0, peak five times that of GPT-3, a
cosine down to 1e-5. Their warm-up is not printed anywhere; here it is 1 % of the steps.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba3.train.config import TrainConfig

# What `mamba3 train` takes for the model's shape: a preset and a pattern, and fields of Mamba3Config.
MODEL_OPTIONS = (
    "preset", "layers", "attention_every", "d_model", "d_state", "headdim", "expand", "ngroups", "mimo_rank",
    "d_intermediate",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A training configuration and a model's shape, with what it is for."""

    purpose: str = ""
    train: TrainConfig = field(default_factory=TrainConfig)
    model: Mapping[str, Any] = field(default_factory=dict)

    def changed(self, train: Mapping[str, Any], model: Mapping[str, Any]) -> "Recipe":
        """The same with other values. Raises ValueError for fields that TrainConfig does not have."""
        return Recipe(self.purpose, TrainConfig.from_dict(self.train.to_dict() | dict(train)), {**self.model, **model})

    def to_json(self) -> str:
        """The text of a configuration file that gives this recipe."""
        return json.dumps({"model": dict(self.model), **self.train.to_dict()}, indent=2) + "\n"


def _paper(size: str, lr: float, micro_tokens: int = 2**15, tokens: float = 100e9) -> Recipe:
    steps = round(tokens / 2**19)
    train = TrainConfig(
        tokenizer="bpe", vocab_size=32_000, layout="packed", seq_len=2048, batch_tokens=2**19, micro_tokens=micro_tokens,
        steps=steps, lr=lr, warmup_steps=steps // 100, min_lr_fraction=1e-5 / lr, dtype="bfloat16", compile=True,
        eval_every=1000, eval_tokens=2**20, save_every=500,
    )  # fmt: skip
    return Recipe(f"the paper's {size} on 100B tokens (a GPU)", train, {"preset": f"siso-{size}"})


RECIPES = {
    "laptop": Recipe("a small model on a processor; the default", TrainConfig(), {}),
    "small": Recipe(
        "37M parameters on 260M tokens, for one GPU",
        TrainConfig(
            tokenizer="bpe", vocab_size=8192, layout="rows", seq_len=1024, batch_tokens=2**16, steps=4000, lr=3e-3,
            warmup_steps=100, schedule="wsd", dtype="bfloat16", compile=True, eval_every=250, eval_tokens=2**19,
            save_every=250,
        ),
        {"d_model": 512, "layers": 10, "d_state": 64, "d_intermediate": 1024},
    ),
    "paper-180m": _paper("180m", 3e-3),
    "paper-440m": _paper("440m", 1.5e-3),
    "paper-880m": _paper("880m", 1.25e-3, 2**14),
    "paper-1.5b": _paper("1.5b", 1e-3, 2**14),
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError for another one."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, but is {name!r}.")
    return RECIPES[name]


def read_recipe(name: str | None = None, file: Path | None = None) -> Recipe:
    """A named recipe, changed by a configuration file. Raises ValueError, naming the file, for what cannot be used."""
    chosen = recipe(name or "laptop")
    if file is None:
        return chosen
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"the configuration file {file} does not exist; give the path of a JSON file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: a training configuration must be JSON, but {error}; correct it there.") from error
    try:
        if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
            raise ValueError(
                "a training configuration, and its model, must be JSON objects; see --show-config for one."
            )
        if name is None and "recipe" in values:
            chosen = recipe(values["recipe"])
        settings = {key: value for key, value in values.items() if key not in ("recipe", "model")}
        return chosen.changed(settings, values.get("model", {}))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
