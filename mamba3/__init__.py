"""Mamba-3: one recurrence, right on every device, with the layer, the language model and training around it."""

from mamba3.lm import Generation, LMState, Mamba3Config, Mamba3LM, preset
from mamba3.nn import Mamba3
from mamba3.ops import ScanOutput, State, scan, step

__version__ = "0.1.0"
__all__ = [
    "Generation", "LMState", "Mamba3", "Mamba3Config", "Mamba3LM", "ScanOutput", "State", "preset", "scan", "step",
]  # fmt: skip
