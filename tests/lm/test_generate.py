"""Generation: greedy is the argmax of the forward pass, filters filter, seeds repeat, stopping stops."""

import pytest
import torch

from mamba3.lm.generate import Sampling, choose, filter_logits, penalize
from tests.lm.test_model import KINDS, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_of_the_forward_pass(kind):
    model, ids = tiny(kind), torch.randint(0, 50, (2, 30))
    out = model.generate(ids, max_new_tokens=8)
    for n in range(8):
        logits = model(torch.cat([ids, out.tokens[:, :n]], dim=1))[:, -1, :50]
        assert torch.equal(out.tokens[:, n], logits.argmax(-1))
    assert out.state.tokens.tolist() == [37, 37] and out.lengths.tolist() == [8, 8] and not out.finished.any()


def test_going_on_from_the_returned_state_is_not_stopping():
    model, ids = tiny("hybrid"), torch.randint(0, 50, (2, 10))
    whole = model.generate(ids, max_new_tokens=9).tokens
    part = model.generate(ids, max_new_tokens=4)
    rest = model.generate(part.tokens[:, -1:], state=part.state, max_new_tokens=5)
    assert torch.equal(torch.cat([part.tokens, rest.tokens], dim=1), whole)
    assert part.state.tokens.tolist() == [13, 13]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_prompt_may_be_read_in_pieces(chunk):
    model, ids = tiny(), torch.randint(0, 50, (2, 40))
    assert torch.equal(
        model.generate(ids, max_new_tokens=5, prefill_chunk=chunk).tokens, model.generate(ids, max_new_tokens=5).tokens
    )


def test_seeds_repeat_and_differ():
    model, ids = tiny(), torch.randint(0, 50, (1, 10))
    runs = [model.generate(ids, max_new_tokens=20, temperature=1.0, seed=seed).tokens.tolist() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_tokens_end_a_sequence_and_then_the_loop():
    model, ids = tiny(), torch.randint(0, 50, (3, 10))
    free = model.generate(ids, max_new_tokens=30, temperature=1.5, seed=7).tokens
    stop = int(free[0, 4])
    out = model.generate(ids, max_new_tokens=30, temperature=1.5, seed=7, stop_tokens=[stop])
    for row in range(3):
        hits = (free[row] == stop).nonzero()
        if row == 0:
            assert len(hits)
            end = int(hits[0])
            assert out.lengths[0] == end + 1 and bool(out.finished[0])
            assert torch.equal(out.tokens[0, : end + 1], free[0, : end + 1]) and (out.tokens[0, end:] == stop).all()
    everything = model.generate(ids, max_new_tokens=30, stop_tokens=range(50))
    assert everything.tokens.shape == (3, 1) and everything.finished.all()


def test_streaming_sees_every_token():
    model, seen = tiny(), []
    out = model.generate(torch.randint(0, 50, (2, 5)), max_new_tokens=6, on_token=seen.append)
    assert torch.equal(torch.stack(seen, 1), out.tokens)


def test_padding_tokens_are_never_chosen():
    model = tiny()
    with torch.no_grad():
        model.embedding.weight[50:] = 100.0
    assert (
        int(model.generate(torch.randint(0, 50, (4, 5)), max_new_tokens=10, temperature=5.0, seed=0).tokens.max()) < 50
    )


LOGITS = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.6}, [0]),  # probabilities .636 .234 .086 .032 .012
        ({"top_p": 0.65}, [0, 1]),
        ({"top_p": 1e-6}, [0]),
        ({"min_p": 0.3}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.3}, [0, 1]),
    ],
)
def test_filters_keep_what_they_say(settings, kept):
    filtered = filter_logits(LOGITS, Sampling(temperature=1.0, **settings))
    assert torch.isfinite(filtered[0]).nonzero().flatten().tolist() == kept


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    draws = choose(LOGITS.expand(20_000, -1), Sampling(temperature=2.0), generator)
    share = torch.bincount(draws, minlength=5) / 20_000
    assert (share - (LOGITS[0] / 2).softmax(-1)).abs().max() < 0.015


def test_the_penalty_makes_what_was_seen_less_likely():
    seen = torch.tensor([[True, False, True, False, True]])
    assert penalize(LOGITS, seen, 2.0).tolist() == [[1.5, 2.0, 0.5, 0.0, -2.0]]
    model, ids = tiny(), torch.randint(0, 50, (1, 10))
    out = model.generate(ids, max_new_tokens=20, repetition_penalty=1e6).tokens[0]
    assert len(set(out.tolist())) == 20 and not set(out.tolist()) & set(ids[0].tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be >= 0; it is -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; it is 0.0"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"min_p": 2}, "min_p must lie in"),
        ({"repetition_penalty": 0}, "repetition_penalty must be > 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(torch.zeros(1, 2, dtype=torch.long), **settings)


def test_prompts_that_are_none():
    model = tiny()
    with pytest.raises(ValueError, match="give the last token chosen"):
        model.generate(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="The state holds 2 sequences but input_ids 1"):
        model.generate(torch.zeros(1, 1, dtype=torch.long), state=model.init_state(2))
