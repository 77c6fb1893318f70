"""Training: a corpus becomes packed tokens, a configuration becomes a run folder that survives being killed.

trainer = prepare("corpus.txt", Path("run"), TrainConfig(steps=500), lambda vocabulary: Mamba3Config(...))
outcome = trainer.run()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba3.train.config import TrainConfig
    from mamba3.train.data import Data
    from mamba3.train.ranks import RankError, Ranks, join
    from mamba3.train.recipes import Recipe, read_recipe
    from mamba3.train.report import Reporter
    from mamba3.train.run import export, prepare
    from mamba3.train.trainer import NonFiniteError, Outcome, Trainer

__all__ = [
    "Data", "NonFiniteError", "Outcome", "RankError", "Ranks", "Recipe", "Reporter", "TrainConfig", "Trainer", "export",
    "join", "prepare", "read_recipe",
]  # fmt: skip

# Loaded on first use: the command line reads TrainConfig's defaults and must not wait for torch to show its help.
_HOMES = {
    "TrainConfig": "config",
    "Data": "data",
    "RankError": "ranks",
    "Ranks": "ranks",
    "join": "ranks",
    "Recipe": "recipes",
    "read_recipe": "recipes",
    "Reporter": "report",
    "prepare": "run",
    "export": "run",
    "NonFiniteError": "trainer",
    "Outcome": "trainer",
    "Trainer": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
