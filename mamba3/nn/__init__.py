"""The block of the paper's figure: the Mamba-3 layer, its norms, the gated MLP, and attention for hybrids."""

from mamba3.nn.attention import Attention
from mamba3.nn.cache import AttentionState, PagedState
from mamba3.nn.mixer import Mamba3
from mamba3.nn.mlp import GatedMLP
from mamba3.nn.norm import RMSNorm

__all__ = ["Attention", "AttentionState", "GatedMLP", "Mamba3", "PagedState", "RMSNorm"]
