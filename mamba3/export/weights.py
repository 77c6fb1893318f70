"""Weights in 8 or 4 bits by torchao: memory for them falls to a half or a quarter of bfloat16, activations stay.

A decode step is bound by reading the weights, so on a GPU it gains time too; on a CPU it does not.
"""

from __future__ import annotations

from torch import nn

from mamba3.export.onnx_file import need

BITS = (8, 4)


def quantize_weights(model: nn.Module, bits: int = 8) -> None:
    """Quantise every nn.Linear of `model` in place: in_proj, out_proj, fc1, fc2, a head of its own; for inference only.

    The embedding (and a tied head), norms, biases and the state stay as they are. 8 bits: one scale a row; 4 bits: one
    scale for 128 weights of a row, CUDA and bfloat16 only.

    Raises ValueError for other bits or a model that cannot have them, ImportError without torchao.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be 8 or 4; it is {bits!r}.")
    need("torchao")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError("The model has no nn.Linear to quantise.")
    if bits == 4 and linears[0].weight.device.type != "cuda":
        raise ValueError(f"4-bit weights need a CUDA device; the model is on {linears[0].weight.device}. Take bits=8.")
    quantize_(model, Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig(group_size=128))
    model.requires_grad_(False).eval()
