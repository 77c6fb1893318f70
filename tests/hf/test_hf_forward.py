"""One forward under transformers: the logits of `Mamba3LM`, whatever the padding, the packing and the way it is called."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, DynamicCache

from mamba3.hf import Mamba3LMCache, Mamba3LMModel
from tests.hf.cases import EVERY_SETTING, KINDS, left_padded, pair, tokens
from tests.ops.cases import distance

SETTINGS = [*((kind, {}) for kind in KINDS), ("siso", EVERY_SETTING)]


@pytest.mark.parametrize(("kind", "changes"), SETTINGS)
def test_forward_is_that_of_the_language_model(kind, changes):
    lm, model = pair(kind, **changes)
    ids = tokens(2, 70)
    output = model(ids)
    assert output.logits.shape == (2, 70, 50)
    assert distance(output.logits, lm(ids)[..., :50]) < 1e-12
    assert output.past_key_values.get_seq_length() == 70
    assert distance(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, output.logits) == 0


@pytest.mark.parametrize(("kind", "changes"), SETTINGS)
def test_padding_leaves_no_trace(kind, changes):
    """Rows padded left, right and in the middle, and their states, are those of the rows alone."""
    lm, model = pair(kind, **changes)
    rows = [tokens(n, seed=n) for n in (9, 4, 1)]
    ids, mask = left_padded(rows)
    output = model(ids, attention_mask=mask)
    for row, sequence in enumerate(rows):
        logits, state = lm.prefill(sequence.unsqueeze(0))
        assert distance(output.logits[row, 9 - len(sequence) :], logits[0, :, :50]) < 1e-12
        for mine, theirs in zip(output.past_key_values.state.select([row]).layers, state.layers, strict=True):
            for name, v in theirs.tensors().items():
                assert (
                    distance(mine.tensors()[name][:, : v.shape[1]] if v.ndim > 1 else mine.tensors()[name], v) < 1e-12
                )
        assert int(output.past_key_values.state.tokens[row]) == len(sequence)
    right = model(ids.flip(1), attention_mask=mask.flip(1)).logits
    assert distance(right[1, :4], lm(rows[1].flip(0).unsqueeze(0))[0, :, :50]) < 1e-12
    hole = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1]] * 3)
    places = (hole.cumsum(1) - 1).masked_fill(hole == 0, 1)  # as transformers counts them
    assert torch.equal(
        model(ids, attention_mask=hole, position_ids=places).logits, model(ids, attention_mask=hole).logits
    )
    assert (
        distance(model(ids, attention_mask=hole).logits[0, hole[0] == 1], lm(ids[:1, hole[0] == 1])[0, :, :50]) < 1e-12
    )


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_padded_rows_go_on_from_a_cache(kind, chunk):
    """Read in pieces of which some rows have nothing yet, as chunked prefill does it."""
    _, model = pair(kind)
    ids, mask = left_padded([tokens(8, seed=8), tokens(2, seed=2)])
    whole = model(ids, attention_mask=mask)
    cache, pieces = Mamba3LMCache(), []
    for at in range(0, 8, chunk):
        end = min(8, at + chunk)
        with torch.no_grad():
            pieces.append(model(ids[:, at:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    real = mask.bool()
    assert distance(torch.cat(pieces, 1)[real], whole.logits[real]) < 1e-12
    assert cache.state.tokens.tolist() == [8, 2]
    after = tokens(2, 3, seed=5)
    assert (
        distance(model(after, past_key_values=cache).logits, model(after, past_key_values=whole.past_key_values).logits)
        < 1e-12
    )


def test_packed_rows_are_separate_sequences():
    """What DataCollatorWithFlattening and TRL send: boundaries, numbers of sequences, or positions that begin again."""
    lm, model = pair("hybrid")
    sequences = [tokens(n, seed=n) for n in (5, 1, 7)]
    alone = torch.cat([lm(s.unsqueeze(0))[0, :, :50] for s in sequences])
    features = [{"input_ids": s.tolist()} for s in sequences]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    batch = collate(features)
    labels = batch.pop("labels")
    assert "cu_seq_lens_q" in batch and "attention_mask" not in batch
    ids = batch["input_ids"]
    for marks in (batch, {"position_ids": batch["position_ids"]}, {"seq_idx": batch["seq_idx"]}):
        output = model(**{"input_ids": ids, **marks})
        assert distance(output.logits[0], alone) < 1e-12
        assert output.past_key_values is None
    assert distance(model(ids).logits[0], alone) > 1e-3  # unmarked, it is one sequence
    twice = model(ids.expand(2, -1), position_ids=batch["position_ids"].expand(2, -1)).logits
    assert distance(twice[1], alone) < 1e-12
    target = labels[0, 1:]
    loss = model(**batch, labels=labels).loss
    assert distance(loss, F.cross_entropy(alone[:-1].float(), target)) < 1e-6
    # The gradient does not cross from one document into another.
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, cu_seq_lens_q=batch["cu_seq_lens_q"]).logits[0, 6:].sum().backward()
    assert embedded.grad[0, :6].abs().max() == 0 < embedded.grad[0, 6:].abs().min()


def test_labels_and_loss():
    lm, model = pair()
    ids = tokens(3, 12)
    labels = ids.clone()
    labels[:, :4] = -100
    want = F.cross_entropy(lm(ids)[:, :-1, :50].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert distance(model(ids, labels=labels).loss, want) < 1e-6
    shares = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    assert distance(shares * 100, want * 24) < 1e-6


def test_logits_to_keep():
    _, model = pair()
    ids = tokens(2, 9)
    whole = model(ids).logits
    assert distance(model(ids, logits_to_keep=3).logits, whole[:, -3:]) < 1e-12
    assert distance(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]]) < 1e-12
    ids, mask = left_padded([tokens(9), tokens(4)])
    whole = model(ids, attention_mask=mask)
    assert distance(model(ids, attention_mask=mask, logits_to_keep=1).logits, whole.logits[:, -1:]) < 1e-12


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # 5.23 has another name, 5.17 only this
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    _, model = pair("hybrid", d_model=32)
    model.train()
    ids = tokens(2, 40)
    batches = [{"input_ids": ids}, {"input_ids": ids, "position_ids": (torch.arange(40) % 13).unsqueeze(0)}]
    for batch in batches:
        gradients = []
        for checkpointing in (False, True):
            model.gradient_checkpointing_disable()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):  # noqa: B023
                loss = model(**batch, labels=ids).loss
            model.zero_grad()
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
            gradients[-1].append(torch.tensor(float(sum(kept))))
        *plain, memory = gradients[0]
        *checkpointed, less = gradients[1]
        assert all(distance(a, b) < 1e-12 for a, b in zip(plain, checkpointed, strict=True))
        assert less < memory / 2


def test_hidden_states_and_tuples():
    _, model = pair("hybrid")
    ids, mask = left_padded([tokens(9), tokens(4)])
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(output.hidden_states) == 4 and all(h.shape == (2, 9, 16) for h in output.hidden_states)
    assert torch.equal(output.hidden_states[0][0], model.get_input_embeddings()(ids)[0])
    assert torch.equal(model.lm_head(output.hidden_states[-1])[..., :50], output.logits)
    logits, cache = model(ids, attention_mask=mask, return_dict=False)
    assert torch.equal(logits, output.logits) and isinstance(cache, Mamba3LMCache)


def test_the_model_without_a_head():
    _, model = pair()
    base = Mamba3LMModel(model.config).double().eval()
    base.load_state_dict(model.model.state_dict())
    ids = tokens(2, 9)
    output = base(ids)
    assert torch.equal(model.lm_head(output.last_hidden_state)[..., :50], model(ids).logits)
    assert (
        distance(
            base(tokens(2, 1), past_key_values=output.past_key_values)[0],
            base(torch.cat([ids, tokens(2, 1)], 1))[0][:, -1:],
        )
        < 1e-12
    )
    assert base(ids, return_dict=False)[0].shape == (2, 9, 16)


def test_training_keeps_no_cache():
    _, model = pair()
    assert model.train()(tokens(1, 4)).past_key_values is None
    assert model(tokens(1, 4), use_cache=True).past_key_values is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"input_ids": tokens(1, 4) + 6 + 50}, r"Token \d+ has no row in the embedding of 56.*resize_token_embeddings"),
        ({"input_ids": tokens(1, 4) - 51}, "Token -"),
        ({"input_ids": tokens(1, 0)}, "at least one token"),
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": tokens(1, 4), "inputs_embeds": torch.zeros(1, 4, 16)}, "one of the two"),
        ({"input_ids": tokens(1, 4), "past_key_values": DynamicCache()}, "must be a mamba3.hf.Mamba3LMCache.*DynamicCache"),
        ({"input_ids": tokens(1, 4), "output_attentions": True}, "no attention weights"),
        ({"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 3)}, "at least 4"),
        ({"input_ids": tokens(2, 4), "attention_mask": torch.zeros(2, 4)}, "zero everywhere"),
        ({"input_ids": tokens(2, 4), "cu_seq_lens_q": [0, 4]}, "one row without padding"),
        ({"input_ids": tokens(1, 4), "cu_seq_lens_q": [0, 3]}, "cu_seqlens"),
        ({"input_ids": tokens(2, 4), "position_ids": torch.arange(3).unsqueeze(0)}, "position_ids"),
        ({"input_ids": tokens(1, 4), "cu_seq_lens_q": [0, 2, 4], "past_key_values": Mamba3LMCache()}, "has no one state"),
    ],
)  # fmt: skip
def test_bad_calls_are_told(call, message):
    _, model = pair()
    with pytest.raises(ValueError, match=message):
        model(**call)


def test_a_cache_of_another_batch():
    _, model = pair()
    cache = model(tokens(2, 4)).past_key_values
    with pytest.raises(ValueError, match=r"holds 2 sequences, but 3 came in.*batch_repeat_interleave"):
        model(tokens(3, 4), past_key_values=cache)
