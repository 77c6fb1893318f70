"""The language model: configuration, presets, the model, its state, and the plain generation loop."""

from mamba3.lm.config import Mamba3Config
from mamba3.lm.generate import Generation
from mamba3.lm.model import Mamba3LM
from mamba3.lm.presets import PRESETS, preset
from mamba3.lm.state import LMState

__all__ = ["PRESETS", "Generation", "LMState", "Mamba3Config", "Mamba3LM", "preset"]
