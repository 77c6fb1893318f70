"""What the model's benchmark does without a GPU: its floors, and how prompts are cut into slices."""

import types

import pytest
import torch

from benchmarks import whole_model
from mamba3.lm import Mamba3LM, preset


def test_the_floors_are_those_of_the_paper_s_model():
    """1.5B: 2 x 1.23e9 products a token without the embedding; a step moves 3 GB of weights and 12.9 GB of state."""
    with torch.device("meta"):
        model = Mamba3LM(preset("siso-1.5b"), dtype=torch.bfloat16)
    moved = types.SimpleNamespace(nbytes=128 * 64 * 64 * 128 * 4)
    decoder = types.SimpleNamespace(batch=128, state=types.SimpleNamespace(layers=[moved] * 24))
    floors = whole_model._floors(model, decoder, 512, {"copy_TBs": 1.0, "matmul_TFLOPs": 1.0})
    assert floors["prefill_s"] == pytest.approx(2 * 128 * 512 * 1.23e9 / 1e12, rel=0.01)
    assert floors["step_s"] == pytest.approx((2 * 6.44e9 + 3.0e9) / 1e12, rel=0.01)


def test_prompts_are_read_in_slices_of_the_batch(monkeypatch):
    """The state and the next tokens are those of the whole batch read at once."""
    torch.manual_seed(0)
    config = preset("siso-180m", vocab_size=50, d_model=32, layers=("mamba3",) * 2, d_state=16, headdim=16)
    model = Mamba3LM(config).requires_grad_(False)
    decoder = object.__new__(whole_model.Decoder)  # without its graph, which needs a GPU
    decoder.model, decoder.batch = model, 5
    decoder.state, decoder.token = model.init_state(5), torch.zeros(5, dtype=torch.int64)
    ids = torch.randint(0, 50, (5, 7))
    monkeypatch.setattr(whole_model, "SLICE", 14)
    with torch.no_grad():
        decoder.read(ids)
        logits, state = model.prefill(ids, last_only=True)
    assert torch.equal(decoder.token, logits[:, -1, :50].argmax(-1))
    for mine, theirs in zip(decoder.state.layers, state.layers, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine[:4], theirs[:4], strict=True))
