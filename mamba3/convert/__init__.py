"""Official checkpoints and layers, to ours and back (mathematics.md, sections 1, 2 and 9)."""

from mamba3.convert.checkpoint import Official, load_official, read_official, save_official
from mamba3.convert.config import config_from_official
from mamba3.convert.decay import DecayChoice, choose_decay
from mamba3.convert.layer import layer_from_official, layer_to_official

__all__ = [
    "DecayChoice", "Official", "choose_decay", "config_from_official", "layer_from_official",
    "layer_to_official", "load_official", "read_official", "save_official",
]  # fmt: skip
