"""generate under transformers: the tokens of `Mamba3LM.generate`, batches equal to singles, and caches that go on."""

import copy

import pytest
import torch
from transformers import TextIteratorStreamer, set_seed
from transformers.generation.streamers import BaseStreamer

from mamba3.hf import Mamba3LMCache
from mamba3.nn.cache import AttentionState, whole_pages
from tests.hf.cases import EVERY_SETTING, KINDS, left_padded, pair, tokens

SETTINGS = [*((kind, {}) for kind in KINDS), ("siso", EVERY_SETTING)]


@pytest.mark.parametrize(("kind", "changes"), SETTINGS)
def test_greedy_is_that_of_the_language_model(kind, changes):
    lm, model = pair(kind, **changes)
    ids = tokens(3, 11)
    want = lm.generate(ids, max_new_tokens=25).tokens
    for settings in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        got = model.generate(ids, do_sample=False, max_new_tokens=25, **settings)
        assert torch.equal(got, torch.cat([ids, want], 1)), settings
    assert torch.equal(model.to_mamba3().generate(ids, max_new_tokens=25).tokens, want)


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 3}],
)
def test_left_padded_batches_equal_singles(kind, settings):
    _, model = pair(kind)
    prompts = [tokens(n, seed=n) for n in (12, 5, 1)]
    ids, mask = left_padded(prompts)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=10, **settings)
    for row, prompt in enumerate(prompts):
        single = model.generate(prompt.unsqueeze(0), max_new_tokens=10, **settings)
        assert torch.equal(batch[row, 12:], single[0, len(prompt) :])


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
def test_beam_search_does_not_depend_on_the_cache(kind):
    _, model = pair(kind)
    settings = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12}
    with_cache = model.generate(tokens(2, 7), **settings)
    assert with_cache.shape == (4, 19)
    assert torch.equal(with_cache, model.generate(tokens(2, 7), use_cache=False, **settings))
    assert not torch.equal(with_cache[0], with_cache[1])


def test_sampling_takes_only_tokens_of_the_vocabulary():
    """And the same seed draws the same, with a cache or without."""
    _, model = pair()
    settings = {"do_sample": True, "temperature": 5.0, "top_k": 0, "max_new_tokens": 40, "num_return_sequences": 3}
    draws = []
    for use_cache in (True, False):
        set_seed(7)
        draws.append(model.generate(tokens(2, 5), use_cache=use_cache, **settings))
    assert torch.equal(*draws) and draws[0].max() < 50
    assert len({tuple(row.tolist()) for row in draws[0]}) == 6


def test_streaming():
    class Collect(BaseStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    _, model = pair()
    streamer = Collect()
    whole = model.generate(tokens(1, 5), do_sample=False, max_new_tokens=9, streamer=streamer)
    assert streamer.got == whole[0].tolist() and streamer.ended
    assert TextIteratorStreamer  # the text streamers are built on the same two calls


def test_stop_token_and_finished_rows():
    _, model = pair()
    ids = tokens(3, 6)
    free = model.generate(ids, do_sample=False, max_new_tokens=8)
    stop = int(free[0, 8])
    halted = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=stop, pad_token_id=0)
    first = int((free[0, 6:] == stop).nonzero()[0])
    assert torch.equal(halted[0, : 7 + first], free[0, : 7 + first]) and halted[0, 7 + first :].sum() == 0


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
@pytest.mark.parametrize("static", [False, True])
def test_a_returned_cache_goes_on_with_new_tokens(kind, static):
    """What follows is the last token chosen and whatever is new; the outcome is that of the whole text."""
    _, model = pair(kind)
    prompts = [tokens(8, seed=1), tokens(3, seed=2)]
    ids, mask = left_padded(prompts)
    first = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=6, return_dict_in_generate=True,
        cache_implementation="static" if static else None,
    )  # fmt: skip
    cache, new = first.past_key_values, tokens(2, 4, seed=3)
    assert cache.get_seq_length() == 13
    fork = copy.deepcopy(cache)
    follows = torch.cat([first.sequences[:, -1:], new], 1)
    second = model.generate(follows, past_key_values=cache, do_sample=False, max_new_tokens=7)
    whole = torch.cat([first.sequences, new], 1)
    whole_mask = torch.cat([mask, torch.ones(2, 10, dtype=mask.dtype)], 1)
    want = model.generate(whole, attention_mask=whole_mask, do_sample=False, max_new_tokens=7)
    assert torch.equal(second[:, 5:], want[:, 18:])
    full_mask = whole_mask  # a mask over everything is understood too
    again = model.generate(
        follows, past_key_values=copy.deepcopy(fork), attention_mask=full_mask, do_sample=False, max_new_tokens=7
    )
    assert torch.equal(again, second)
    assert fork.get_seq_length() == 13, "a fork stays where it was"
    fork.batch_repeat_interleave(2)
    beams = model.generate(follows, past_key_values=fork, num_beams=2, max_new_tokens=7)
    assert torch.equal(
        beams[:, 5:], model.generate(whole, attention_mask=whole_mask, num_beams=2, max_new_tokens=7)[:, 18:]
    )


def test_a_used_cache_with_the_whole_prompt_raises():
    _, model = pair()
    prompt = tokens(1, 6)
    first = model.generate(prompt, do_sample=False, max_new_tokens=5, return_dict_in_generate=True)
    cache = first.past_key_values
    for ids in (prompt, first.sequences, torch.cat([first.sequences, tokens(1, 3)], 1)):
        for call in ((ids,), ()):
            with pytest.raises(ValueError, match=r"has read 10 tokens.*input_ids\[:, 10:\]"):
                model.generate(*call, **({} if call else {"input_ids": ids}), past_key_values=cache, max_new_tokens=5)
    assert cache.get_seq_length() == 10
    model.generate(first.sequences[:, -1:], past_key_values=cache, max_new_tokens=5)
    cache.reset()
    fresh = model.generate(prompt, past_key_values=cache, do_sample=False, max_new_tokens=5)
    assert torch.equal(fresh, first.sequences)


def test_a_static_cache_stays_where_it_is():
    _, model = pair("hybrid")
    cache = Mamba3LMCache(room=100)
    with torch.no_grad():
        model(tokens(2, 6), past_key_values=cache)
        where = [t.data_ptr() for layer in cache.state.layers for t in layer.tensors().values()]
        for t in range(80):
            model(tokens(2, 1, seed=t), past_key_values=cache)
    assert where == [t.data_ptr() for layer in cache.state.layers for t in layer.tensors().values()]
    assert [layer.k.shape[1] for layer in cache.state.layers if isinstance(layer, AttentionState)] == [whole_pages(100)]


def test_what_a_state_cannot_do_is_told():
    _, model = pair()
    prompt = tokens(1, 6)
    cache = model(prompt).past_key_values
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="only a Mamba3LM model"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    for settings, message in (
        ({"cache_implementation": "quantized"}, "dynamic or static"),
        ({"cache_implementation": "offloaded"}, "dynamic or static"),
        ({"past_key_values": cache, "cache_implementation": "static"}, "one of the two"),
        ({"past_key_values": cache, "prefill_chunk_size": 2}, "fresh cache only"),
        ({"prompt_lookup_num_tokens": 3}, "stateful"),
        ({"assistant_model": model}, "stateful"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens(1, 3, seed=9), max_new_tokens=4, **settings)
    with pytest.raises(ValueError, match="has no row in the embedding of 56"):
        model.generate(torch.tensor([[3, 57]]), max_new_tokens=4)
