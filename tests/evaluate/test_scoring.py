"""Laws of scoring and continuing: whatever shares a batch changes nothing, and the definition is the plain loop."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba3 import Mamba3Config, Mamba3LM
from mamba3.evaluate import continue_prompts, log_likelihoods, rolling_log_likelihood
from mamba3.evaluate.continuing import _batches
from mamba3.lm.generate import Sampling

VOCABULARY = 61  # padded to 64: three rows of the embedding are no tokens
KINDS = {
    "siso": {},
    "mimo": {"mimo_rank": 2},
    "hybrid": {"layers": ("mamba3", "attention"), "attn_heads": 2},
}


def tiny(kind="siso", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    shape = {
        "d_model": 32,
        "layers": ("mamba3", "mamba3"),
        "d_state": 16,
        "headdim": 16,
        "d_intermediate": 64,
        "tie_embeddings": False,
    }
    model = Mamba3LM(Mamba3Config(vocab_size=VOCABULARY, **{**shape, **KINDS[kind]}), dtype=dtype)
    with torch.no_grad():
        model.embedding.weight.normal_()  # an untrained model that tells its contexts apart
        model.lm_head.weight.normal_(std=0.3)
    return model.eval()


def random_pairs(count, seed=0):
    random = torch.Generator().manual_seed(seed)

    def tokens(least, most):
        n = int(torch.randint(least, most + 1, (), generator=random))
        return torch.randint(VOCABULARY, (n,), generator=random).tolist()

    lengths = [(1, 1), (1, 30), (60, 70), (1, 140)]
    return [(tokens(*lengths[i % 4]), tokens(1, 1 + 5 * (i % 3))) for i in range(count)]


@torch.no_grad()
def by_steps(model, context, continuation):
    """The definition: one token after another, each by `step`."""
    state, row, total, greedy = model.init_state(1), [*context, *continuation], 0.0, True
    for i, token in enumerate(row[:-1]):
        logits, state = model.step(torch.tensor([token]), state)
        if i + 1 >= len(context):
            scores = logits[0, :VOCABULARY].double().log_softmax(-1)
            total += scores[row[i + 1]].item()
            greedy &= int(scores.argmax()) == row[i + 1]
    return total, greedy


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_plain_loop(kind):
    model, pairs = tiny(kind), random_pairs(9)
    # a continuation that is greedy, and one that is so but for its last token
    context = pairs[3][0]
    likely = model.generate(torch.tensor([context]), max_new_tokens=3).tokens[0].tolist()
    pairs += [(context, likely), (context, [*likely[:-1], (likely[-1] + 1) % VOCABULARY])]
    found = {index: (score, greedy) for index, score, greedy in log_likelihoods(model, pairs, 4)}
    assert sorted(found) == list(range(len(pairs)))
    for i, pair in enumerate(pairs):
        score, greedy = by_steps(model, *pair)
        assert found[i] == (pytest.approx(score, abs=1e-10), greedy), i
    assert found[len(pairs) - 2][1] and not found[len(pairs) - 1][1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_with_padding_scores_as_each_pair_alone(kind, dtype):
    """Length 1, lengths about a chunk, and longer ones side by side, to the rounding of the dtype."""
    model, pairs = tiny(kind, dtype), random_pairs(24, seed=1)
    alone = {i: s for pair in range(24) for _, *s in log_likelihoods(model, [pairs[pair]], 1) for i in [pair]}
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    for batch_size in (2, 7, 24):
        for index, score, greedy in log_likelihoods(model, pairs, batch_size):
            assert score == pytest.approx(alone[index][0], abs=bound)
            assert greedy == alone[index][1]


def test_the_longest_come_first_and_what_is_empty_is_certain():
    model = tiny()
    pairs = [([1], [2]), ([1, 2, 3], []), ([4] * 9, [5])]
    assert [(i, s == 0.0) for i, s, _ in log_likelihoods(model, pairs, 2)] == [(1, True), (2, False), (0, False)]
    with pytest.raises(ValueError, match="that of pair 1 has none"):
        list(log_likelihoods(model, [([1], [2]), ([], [2])]))
    with pytest.raises(ValueError, match="batch_size"):
        list(log_likelihoods(model, pairs, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rolling_score_is_one_sum_however_it_is_read(kind):
    """No window forgets: reading 7 tokens at a time gives the score of reading all at once."""
    model, tokens = tiny(kind), torch.randint(VOCABULARY, (150,)).tolist()
    ((_, whole, _),) = log_likelihoods(model, [([3], tokens)])
    for window in (1, 7, 64, 149, 150, 1024):
        assert rolling_log_likelihood(model, tokens, 3, window) == pytest.approx(whole, abs=1e-9)
    assert rolling_log_likelihood(model, [], 3) == 0
    forgetful = sum(s for _, s, _ in log_likelihoods(model, [([3], tokens[:75]), (tokens[74:75], tokens[75:])]))
    assert abs(forgetful - whole) > 1e-3


def spell(tokens):
    return "".join(chr(ord("0") + token) for token in tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_continuations_do_not_depend_on_their_batch(kind, monkeypatch):
    model = tiny(kind)
    prompts = [context for context, _ in random_pairs(7, seed=2)]
    expected = [spell(model.generate(torch.tensor([p]), max_new_tokens=20).tokens[0].tolist()) for p in prompts]
    for batch_size in (1, 3, 7):
        assert dict(continue_prompts(model, prompts, spell, max_new_tokens=20, batch_size=batch_size)) == dict(
            enumerate(expected)
        )
    monkeypatch.setattr("mamba3.evaluate.continuing.PREFILL", 5)
    monkeypatch.setattr("mamba3.evaluate.continuing.PACK", 80)
    assert dict(continue_prompts(model, prompts, spell, max_new_tokens=20)) == dict(enumerate(expected))


def test_each_continuation_ends_where_its_own_stop_text_or_end_begins():
    model = tiny()
    prompts = [context for context, _ in random_pairs(6, seed=3)]
    whole = dict(continue_prompts(model, prompts, spell, max_new_tokens=30))
    stops = [whole[0][5:7], whole[3][9], "not there"]

    def cut(text):
        return text[: min([at for at in map(text.find, stops) if at >= 0], default=len(text))]

    found = dict(continue_prompts(model, prompts, spell, stops=stops, max_new_tokens=30, batch_size=4))
    assert found == {i: cut(text) for i, text in whole.items()}
    assert len({len(text) for text in found.values()}) > 1
    end = ord(whole[2][4]) - ord("0")
    for i, text in continue_prompts(model, prompts, spell, end=end, max_new_tokens=30):
        assert text == whole[i].split(chr(ord("0") + end))[0]
    with pytest.raises(ValueError, match="at least one character"):
        list(continue_prompts(model, prompts, spell, stops=[""]))
    with pytest.raises(ValueError, match="at least one token"):
        list(continue_prompts(model, [[]], spell))


def test_draws_are_those_of_the_seed():
    model, prompts = tiny(), [[1, 2, 3]] * 4
    warm = {"sampling": Sampling(temperature=1.0), "max_new_tokens": 12}
    first = dict(continue_prompts(model, prompts, spell, seed=1, **warm))
    assert first == dict(continue_prompts(model, prompts, spell, seed=1, **warm))
    assert first != dict(continue_prompts(model, prompts, spell, seed=2, **warm))
    assert len(set(first.values())) > 1


@given(lengths=st.lists(st.integers(1, 20_000), max_size=12), batch_size=st.integers(1, 5))
def test_batches_hold_each_prompt_once_within_the_limits(lengths, batch_size):
    batches = list(_batches(lengths, batch_size))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= 16384 for batch in batches)
