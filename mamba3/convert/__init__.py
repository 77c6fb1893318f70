"""Official checkpoints and layers, to ours, to transformers' layout, and back (mathematics.md, sections 1, 2 and 9)."""

from mamba3.convert.checkpoint import Loaded, Official, load_official, read_model, read_official, save_official
from mamba3.convert.config import config_from_official
from mamba3.convert.decay import DecayChoice, choose_decay
from mamba3.convert.folder import Conversion, convert_folder
from mamba3.convert.layer import layer_from_official, layer_to_official

__all__ = [
    "Conversion", "DecayChoice", "Loaded", "Official", "choose_decay", "config_from_official", "convert_folder",
    "layer_from_official", "layer_to_official", "load_official", "read_model", "read_official", "save_official",
]  # fmt: skip
