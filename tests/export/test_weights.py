"""torchao's weight-only quantisation: every projection, and nothing else."""

import copy
import gc

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from mamba3 import LMState, Mamba3LM
from mamba3.export import quantize_weights
from mamba3.export import weights as weights_file
from tests.hf.cases import pair, tokens
from tests.lm.test_model import tiny
from tests.ops.cases import distance

pytest.importorskip("torchao", reason="quantisation needs torchao")


@pytest.mark.parametrize("kind", ["siso", "mimo", "hybrid"])
def test_int8_weights(kind, tmp_path):
    """The model computes with the rounded weights, and is another model to the states of the one before."""
    lm = tiny(kind, dtype=torch.float32, d_model=64)
    before = copy.deepcopy(lm)
    quantize_weights(lm)
    for name, module in lm.named_modules():
        if isinstance(module, nn.Linear):
            assert type(module.weight).__name__ == "Int8Tensor", name
            plain = before.get_submodule(name)
            with torch.no_grad():
                plain.weight.copy_(module.weight.dequantize())
    assert type(lm.embedding.weight) is nn.Parameter and lm.layers[0].mixer.dt_bias.dtype == torch.float32
    ids = tokens(2, 40)
    assert 0 < distance(lm(ids), tiny(kind, dtype=torch.float32, d_model=64)(ids)) < 0.05
    assert distance(lm(ids), before(ids)) < 1e-5
    assert torch.equal(lm.generate(ids, max_new_tokens=10).tokens, before.generate(ids, max_new_tokens=10).tokens)
    with torch.no_grad():
        state = lm.prefill(ids)[1]
    state.save(tmp_path / "state", lm)
    LMState.load(tmp_path / "state", lm)
    with pytest.raises(ValueError, match="another model"):
        LMState.load(tmp_path / "state", tiny(kind, dtype=torch.float32, d_model=64))


def test_int8_weights_under_transformers():
    lm, model = pair("siso", dtype=torch.float32, d_model=64)
    quantize_weights(lm)
    quantize_weights(model)
    ids = tokens(2, 20)
    assert type(model.model.layers[0].mlp.fc1.weight).__name__ == "Int8Tensor"
    got = model.generate(ids, do_sample=False, max_new_tokens=10)
    assert got.shape == (2, 30)
    assert distance(model.model(ids)[0], lm.hidden(ids)) < 1e-5


def test_int8_weights_through_transformers_files(tmp_path):
    """Quantised while loading, by transformers' own setting; what it then saves loads as it was."""
    from torchao.quantization import Int8WeightOnlyConfig

    lm, _ = pair("mimo", dtype=torch.float32, d_model=64)
    lm.save_pretrained(tmp_path)
    settings = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    assert type(model.model.layers[0].mixer.in_proj.weight).__name__ == "Int8Tensor"
    ids = tokens(2, 20)
    assert 0 < distance(model(ids).logits, lm(ids)[..., :50]) < 0.05
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "int8")(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="no field quantization_config"):
        Mamba3LM.from_pretrained(tmp_path / "int8")


def test_bad_input_is_told(monkeypatch):
    lm = tiny("siso", dtype=torch.float32)
    with pytest.raises(ValueError, match="bits must be 8 or 4"):
        quantize_weights(lm, 3)
    with pytest.raises(ValueError, match="4-bit weights need a CUDA device"):
        quantize_weights(lm, 4)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        quantize_weights(nn.Embedding(3, 4))
    with pytest.raises(ImportError, match=r"pip install 'mamba3\[export\]'"):
        weights_file.need("a_library_that_is_not_there")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_on_a_gpu(bits):
    """Less memory, logits near the original's, the fused decode step still runs, and states know their weights."""
    ids, empty = tokens(2, 100).cuda(), torch.cuda.memory_allocated()
    lm = tiny("siso", dtype=torch.bfloat16, d_model=1024, d_state=64, headdim=64, d_intermediate=2048).cuda()
    before, plain = torch.cuda.memory_allocated() - empty, copy.deepcopy(lm)
    with torch.no_grad():
        quantize_weights(lm, bits)
        gc.collect()
        assert torch.cuda.memory_allocated() - empty - before < (0.6 if bits == 8 else 0.35) * before
        assert 0 < distance(lm(ids).float(), plain(ids).float()) < (0.05 if bits == 8 else 0.3)
    assert lm.fingerprint() != plain.fingerprint()
    assert lm.generate(ids, max_new_tokens=10).tokens.shape == (2, 10)


@pytest.mark.gpu
def test_a_width_that_four_bits_cannot_have_takes_eight():
    lm = tiny("siso", dtype=torch.bfloat16, d_model=192, headdim=64, d_intermediate=256).cuda()
    quantize_weights(lm, 4)
    mlp = lm.layers[0].mlp
    assert type(mlp.fc1.weight).__name__ == "Int8Tensor"
    assert type(mlp.fc2.weight).__name__ == "Int4TilePackedTo4dTensor"
    with pytest.raises(ValueError, match="need a bfloat16 model"):
        quantize_weights(tiny("siso", dtype=torch.float32, d_model=64).cuda(), 4)
