"""device_map: spread by accelerate over devices, memory and disk, the logits and tokens stay what they are."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hf.cases import EVERY_SETTING, left_padded, pair, tokens

pytest.importorskip("accelerate", reason="device_map needs accelerate")


def check(spread, whole):
    ids, mask = left_padded([tokens(9), tokens(4)])
    assert torch.equal(spread(ids, attention_mask=mask).logits.cpu(), whole(ids, attention_mask=mask).logits)
    for settings in ({"do_sample": False}, {"num_beams": 2}):
        got = spread.generate(ids, attention_mask=mask, max_new_tokens=8, **settings)
        assert torch.equal(got, whole.generate(ids, attention_mask=mask, max_new_tokens=8, **settings))


@pytest.mark.parametrize("changes", [{}, EVERY_SETTING])
def test_auto(changes, tmp_path):
    _, whole = pair("siso", dtype=torch.float32, **changes)
    whole.save_pretrained(tmp_path)
    check(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto"), whole)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # 5.23 has another name, 5.17 only this
@pytest.mark.parametrize("changes", [{}, EVERY_SETTING])
def test_layers_on_the_disk(changes, tmp_path):
    """Their weights are there only while they compute, also those that a layer reads without calling a module."""
    _, whole = pair("siso", dtype=torch.float32, **changes)
    whole.save_pretrained(tmp_path)
    where = {"model.embedding": "cpu", "model.layers.0": "cpu", "model.norm_f": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{i}": "disk" for i in range(1, len(whole.model.layers))}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "offload")
    assert all(p.is_meta for p in spread.model.layers[1].parameters())
    check(spread, whole)
    spread.train().gradient_checkpointing_enable()
    loss = spread(tokens(1, 8), labels=tokens(1, 8)).loss
    assert torch.equal(loss, whole(tokens(1, 8), labels=tokens(1, 8)).loss)


@pytest.mark.gpu
def test_layers_on_the_other_device(tmp_path):
    _, whole = pair("hybrid", dtype=torch.float32)
    whole.save_pretrained(tmp_path)
    where = {
        "model.embedding": 0,
        "model.layers.0": 0,
        "model.layers.1": "cpu",
        "model.layers.2": 0,
        "model.norm_f": 0,
        "lm_head": 0,
    }
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where)
    ids, mask = left_padded([tokens(9), tokens(4)])
    whole = whole.cuda()
    got, want = (m(ids.cuda(), attention_mask=mask.cuda()).logits for m in (spread, whole))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert spread.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=8, do_sample=False).shape == (2, 17)
