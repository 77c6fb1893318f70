"""Tiny models on both sides of the bridge: a `Mamba3LM` and the same weights under transformers."""

import torch

from mamba3.hf import Mamba3LMConfig, Mamba3LMForCausalLM
from tests.lm.test_model import KINDS, tiny

EVERY_SETTING = {
    "layers": ("mamba3", "attention", "mamba3"), "attn_heads": 2, "mimo_rank": 2, "d_conv": 3, "out_norm": "pre_gate",
    "bc_bias_trainable": False, "tie_embeddings": False,
}  # fmt: skip
VOCABULARY = 50


def pair(kind="siso", dtype=torch.float64, **changes):
    """(lm, model): the same weights; `model` is in evaluation mode, as from_pretrained leaves it."""
    lm = tiny(kind, dtype=dtype, **changes)
    model = Mamba3LMForCausalLM(Mamba3LMConfig.from_mamba3(lm.config)).to(dtype)
    weights = lm.state_dict()
    head = weights.pop("lm_head.weight", weights["embedding.weight"])
    model.model.load_state_dict(weights)
    model.lm_head.load_state_dict({"weight": head})
    return lm, model.eval()


def tokens(*shape, seed=1):
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(sequences, pad=0):
    """(input_ids, attention_mask) of sequences of unequal lengths."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :], mask[row, width - len(sequence) :] = sequence, 1
    return ids, mask


__all__ = ["EVERY_SETTING", "KINDS", "VOCABULARY", "left_padded", "pair", "tokens"]
