"""ONNX: onnxruntime chooses the tokens that PyTorch chooses, for any batch and any length of prompt."""

import json

import numpy as np
import pytest
import torch

from mamba3.export import OnnxLM, export_onnx, quantize_onnx
from tests.hf.cases import tokens
from tests.lm.test_model import tiny

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason=f"export needs {library}")

CASES = {
    "siso": {"kind": "no mlp"},
    "mimo": {"kind": "mimo", "d_conv": 3, "out_norm": "pre_gate", "rotation": "standard"},
}


@pytest.fixture(scope="module", params=["siso", pytest.param("mimo", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    settings = {**CASES[request.param]}
    lm = tiny(settings.pop("kind"), dtype=torch.float32, **settings)
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(lm, folder, prefill_tokens=40)
    assert lm.training and all(p.requires_grad for p in lm.parameters())
    return lm, folder


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 39), (2, 40), (5, 97)])
def test_onnxruntime_chooses_the_same_tokens(exported, batch, length):
    lm, folder = exported
    model, ids = OnnxLM(folder, threads=1), tokens(batch, length)
    got = model.generate(ids.numpy(), max_new_tokens=20)
    assert np.array_equal(got, lm.generate(ids, max_new_tokens=20).tokens.numpy())
    with torch.no_grad():
        logits, state = lm.prefill(ids, last_only=True)
    mine, after = model.prefill(ids.numpy())
    np.testing.assert_allclose(mine, logits[:, -1, :50].numpy(), rtol=1e-4, atol=1e-5)
    for i, layer in enumerate(state.layers):
        for name, v in layer.tensors(f"layers.{i}.").items():
            np.testing.assert_allclose(after[name], v.numpy(), rtol=1e-4, atol=1e-5)
    split, half = model.prefill(ids.numpy()[:, : length // 2 + 1]), ids.numpy()[:, length // 2 + 1 :]
    if half.size:
        np.testing.assert_allclose(model.prefill(half, split[1])[0], mine, rtol=1e-4, atol=1e-5)


def test_a_step_leaves_the_state_given_alone(exported):
    _, folder = exported
    model = OnnxLM(folder, threads=1)
    state = model.init_state(2)
    before = {name: v.copy() for name, v in state.items()}
    model.step(np.array([3, 4]), state)
    assert all(np.array_equal(state[name], v) for name, v in before.items())


def test_dynamic_int8(exported, tmp_path):
    """Smaller by what its matrices were, near the original, and the state is still float32."""
    lm, folder = exported
    quantize_onnx(folder, tmp_path)
    model, ids = OnnxLM(tmp_path, threads=1), tokens(4, 60)
    mine, state = model.prefill(ids.numpy())
    with torch.no_grad():
        want = lm(ids)[:, -1, :50].numpy()
    error = np.abs(mine - want).max() / np.abs(want).max()
    assert 0 < error < 0.15
    assert {v.dtype for v in state.values()} == {np.dtype(np.float32)}
    assert (tmp_path / "step.onnx").stat().st_size < (folder / "step.onnx").stat().st_size


def test_bad_input_is_told(exported, tmp_path):
    _, folder = exported
    for model, message in (
        (tiny("hybrid", dtype=torch.float32), "attention layers"),
        (tiny("siso", dtype=torch.bfloat16), "takes a float32 model"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(model, tmp_path)
    with pytest.raises(ValueError, match="at least 2"):
        export_onnx(tiny("siso", dtype=torch.float32), tmp_path, prefill_tokens=1)
    for call in (lambda: OnnxLM(tmp_path), lambda: quantize_onnx(tmp_path, tmp_path / "out")):
        with pytest.raises(ValueError, match="holds no exported model"):
            call()
    model = OnnxLM(folder, threads=1)
    with pytest.raises(ValueError, match=r"Tokens must lie in \[0, 50\)"):
        model.generate(np.array([[50]]))
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(np.zeros((1, 0), np.int64))
    for name in ("step.onnx", "prefill.onnx", "onnx.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    values = json.loads((tmp_path / "onnx.json").read_text())
    (tmp_path / "onnx.json").write_text(json.dumps({**values, "version": 99}))
    with pytest.raises(ValueError, match=r"version 99.*Export it again"):
        OnnxLM(tmp_path)
