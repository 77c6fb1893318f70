"""Out of PyTorch, and into fewer bits: ONNX files of prefill and step, onnxruntime around them, torchao on the weights."""

from mamba3.export.onnx_file import export_onnx, quantize_onnx
from mamba3.export.onnx_model import OnnxLM
from mamba3.export.weights import quantize_weights

__all__ = ["OnnxLM", "export_onnx", "quantize_onnx", "quantize_weights"]
