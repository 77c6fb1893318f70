"""prefill and step as two ONNX files: tokens and the state go in, logits and the next state come out.

    step.onnx       tokens [b],    state -> logits [b, v], next state
    prefill.onnx    tokens [b, t], state -> logits [b, v] of the last token, next state       (b is free, t is fixed)

A prompt of any length is read by prefills of t tokens and then by steps, for prefill(a + b) = prefill(b, prefill(a)).
The tensors of the state are those of a state file, `layers.0.phi` and so on; a next state's are `next.layers.0.phi`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba3.lm import LMState, Mamba3LM
from mamba3.ops import State

CONFIG_FILE, STEP_FILE, PREFILL_FILE = "onnx.json", "step.onnx", "prefill.onnx"
VERSION = 1
NEXT = "next."


def need(library: str) -> None:
    """ImportError that says what to install."""
    try:
        __import__(library)
    except ImportError as error:
        raise ImportError(f"{library} is missing; pip install 'mamba3[export]'.") from error


class _Verb(nn.Module):
    """One verb with the state as a flat list of tensors."""

    def __init__(self, model: Mamba3LM, names: list[str], read: Callable[[Mamba3LM, Tensor, LMState], Any]):
        super().__init__()
        self.model, self.names, self.read = model, names, read

    def forward(self, tokens: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # The step writes into its state; the graph's inputs stay as they came.
        layers: list[Any] = _layers(dict(zip(self.names, (v.clone() for v in tensors), strict=True)))
        counts = torch.zeros(tokens.shape[0], dtype=torch.int64)
        logits, state = self.read(self.model, tokens, LMState(layers, counts))
        after = _tensors(state)
        return logits[..., : self.model.config.vocab_size], *(after[name] for name in self.names)


def _layers(tensors: dict[str, Tensor]) -> list[State]:
    layers: list[dict[str, Tensor]] = []
    for name, v in tensors.items():
        _, index, field = name.split(".")
        if int(index) == len(layers):
            layers.append({})
        layers[int(index)][field] = v
    return [State(**fields) for fields in layers]


def _tensors(state: LMState) -> dict[str, Tensor]:
    return {name: v for i, layer in enumerate(state.layers) for name, v in layer.tensors(f"layers.{i}.").items()}


def _step(model: Mamba3LM, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
    return model.step(tokens, state)


def _prefill(model: Mamba3LM, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
    logits, state = model.prefill(tokens, state, last_only=True)
    return logits[:, -1], state


def export_onnx(model: Mamba3LM, folder: str | Path, *, prefill_tokens: int = 64) -> None:
    """Write step.onnx, prefill.onnx and onnx.json, which says what they hold, into `folder`.

    Args:
        model: on the CPU, in float32, without attention layers: the size of their cache is no constant.
        prefill_tokens: t, how many tokens one call of the prefill reads; its graph grows with it.

    Raises ValueError where the model is another, ImportError without onnx and onnxscript.
    """
    need("onnxscript")
    _check(model, prefill_tokens)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameter_gradients = [p.requires_grad for p in model.parameters()]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        state = _tensors(model.init_state(2))
        _write(model, state, _step, torch.zeros(2, dtype=torch.int64), folder / STEP_FILE)
        _write(model, state, _prefill, torch.zeros(2, prefill_tokens, dtype=torch.int64), folder / PREFILL_FILE)
    finally:
        model.train(training)
        for p, needed in zip(model.parameters(), parameter_gradients, strict=True):
            p.requires_grad_(needed)
    shapes = {name: [*v.shape[1:]] for name, v in state.items()}
    values = {
        "version": VERSION, "prefill_tokens": prefill_tokens, "state": shapes, "fingerprint": model.fingerprint(),
        "vocab_size": model.config.vocab_size, "model": model.config.to_dict(),
    }  # fmt: skip
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


def _check(model: Mamba3LM, prefill_tokens: int) -> None:
    weight = model.embedding.weight
    if "attention" in model.config.layers:
        raise ValueError(
            "ONNX export is for models of Mamba-3 layers alone; this one has attention layers, whose cache grows."
        )
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError(
            f"ONNX export takes a float32 model on the CPU; this one is {weight.dtype} on {weight.device}. Load it with "
            "dtype=torch.float32, and make the files smaller afterwards (quantize_onnx)."
        )
    if prefill_tokens < 2:
        raise ValueError(f"prefill_tokens must be at least 2; it is {prefill_tokens}.")


def _write(model: Mamba3LM, state: dict[str, Tensor], read: Any, tokens: Tensor, path: Path) -> None:
    names = list(state)
    batch = torch.export.Dim("batch")
    free = ({0: batch}, tuple({0: batch} for _ in names))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter (2.13) about itself: names of axes, tree specs
        program = torch.onnx.export(
            _Verb(model, names, read).eval(), (tokens, *state.values()), dynamo=True, dynamic_shapes=free,
            input_names=["tokens", *names], output_names=["logits", *(NEXT + name for name in names)], verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(path)


def quantize_onnx(folder: str | Path, out: str | Path) -> None:
    """The same files with the weights of every matrix product in int8 (dynamic: activations are rounded as they come).

    The recurrence and its state stay float32. Measured in docs/transformers.md.
    """
    need("onnx")
    need("onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder, out = Path(folder), Path(out)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds no exported model: it has no {CONFIG_FILE}. Write one with export_onnx.")
    out.mkdir(parents=True, exist_ok=True)
    for name in (STEP_FILE, PREFILL_FILE):
        graph = onnx.load(folder / name)
        _unshare(graph.graph)
        quantize_dynamic(
            graph, out / name, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, per_channel=True,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    shutil.copy(folder / CONFIG_FILE, out / CONFIG_FILE)


def _unshare(graph: Any) -> None:
    """onnxruntime (1.31) turns a Gemm's weight round in place before it quantises: an embedding tied to the head would be
    turned with it, and the shapes noted beside the graph become wrong."""
    weights = {v.name: v for v in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        if node.op_type == "Gemm" and uses[node.input[1]] > 1 and node.input[1] in weights:
            copy = graph.initializer.add()
            copy.CopyFrom(weights[node.input[1]])
            copy.name = f"{node.input[1]}.{node.name}"
            node.input[1] = copy.name
    del graph.value_info[:]
