"""Weights in 8 or 4 bits by torchao: memory for them falls to a half or a quarter of bfloat16, activations stay.

A decode step on a GPU is bound by reading the weights; `python -m benchmarks.weight_bits` measures what fewer bits give.
"""

from __future__ import annotations

import torch
from torch import nn

from mamba3.export.onnx_file import need

BITS = (8, 4)
GROUP = 128  # weights of a row under one 4-bit scale


def quantize_weights(model: nn.Module, bits: int = 8) -> None:
    """Quantise every nn.Linear of `model` in place: in_proj, out_proj, fc1, fc2, a head of its own; for inference only.

    The embedding (and a tied head), norms, biases and the state stay as they are. 8 bits: one scale a row. 4 bits: one
    scale and offset for 128 weights of a row, on CUDA in bfloat16; a layer whose in_features is no multiple of 128 takes 8.

    Raises ValueError for other bits or a model that cannot have them, ImportError without torchao.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be 8 or 4; it is {bits!r}.")
    need("torchao")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError("The model has no nn.Linear to quantise.")
    if bits == 4:
        for linear in linears:
            _check_four_bits(linear.weight)
        # Of torchao's layouts for 4 bits the one whose product is in PyTorch itself.
        four = Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D, set_inductor_config=False
        )
        quantize_(model, four, lambda m, _: isinstance(m, nn.Linear) and m.in_features % GROUP == 0)
        quantize_(model, Int8WeightOnlyConfig(), lambda m, _: isinstance(m, nn.Linear) and m.in_features % GROUP != 0)
    else:
        quantize_(model, Int8WeightOnlyConfig())
    model.requires_grad_(False).eval()


def _check_four_bits(weight: torch.Tensor) -> None:
    if weight.device.type != "cuda":
        raise ValueError(f"4-bit weights need a CUDA device; the model is on {weight.device}. Take bits=8.")
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"4-bit weights need a bfloat16 model; this one is {weight.dtype}. Load it with that dtype.")
