"""Speculation changes how fast tokens come, and nothing else: not the greedy ones, not the drawn ones, not the states."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3.engine import LLM, Engine, EngineConfig, ModelDraft, NGramDraft, Request, SamplingParams
from mamba3.train.tokenizer import byte_tokenizer
from tests.engine.cases import Arrival, arrivals, configs, model, play
from tests.engine.test_engine import COPIES, SEEDED, check_greedy
from tests.lm.test_model import KINDS, tiny
from tests.ops.cases import distance

LAYERS = {**KINDS, "conv": {"layers": ("mamba3",) * 2, "d_conv": 4}}


class Oracle:
    """Guesses what the plain loop says, but for every third token."""

    def __init__(self, lm):
        self.lm = lm

    def propose(self, sequence, count):
        said = torch.tensor([[*sequence.tokens.tolist(), *sequence.chosen]])
        right = self.lm.generate(said, max_new_tokens=count).tokens[0].tolist() if count else []
        return [(token + 1) % 50 if (said.shape[1] + i) % 3 == 0 else token for i, token in enumerate(right)]


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=8)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_accepting_some_tokens_is_having_read_them_alone(kind, counts, seed):
    """verify and accept(counts) = prefill of the first counts[i] tokens of each row, states and logits."""
    lm = tiny(vocab_size=50, **LAYERS[kind]) if kind == "conv" else model(kind)
    torch.manual_seed(seed)
    before, ids = torch.randint(0, 50, (len(counts), 7)), torch.randint(0, 50, (len(counts), 5))
    with torch.no_grad():
        _, start = lm.prefill(before)
        state = start.clone()
        for i, layer in enumerate(state.layers):
            if hasattr(layer, "grow"):
                state.layers[i] = layer.grow(12)
        logits, draft = lm.verify(ids, state)
        whole, _ = lm.prefill(ids, start)
        assert distance(logits, whole) < 1e-10
        draft.accept(counts)
        for row, count in enumerate(counts):
            alone = start.select([row])
            if count:
                _, alone = lm.prefill(ids[row : row + 1, :count], alone)
            mine = state.select([row])
            assert torch.equal(mine.tokens, alone.tokens)
            token = torch.tensor([3])
            grown = [layer._replace(used=7 + count) if hasattr(layer, "used") else layer for layer in mine.layers]
            mine.layers = grown
            assert distance(lm.step(token, mine)[0], lm.step(token, alone)[0]) < 1e-10


@pytest.mark.parametrize("kind", ["siso", "hybrid"])
@settings(max_examples=4)
@given(data=st.data())
def test_greedy_with_guesses_is_the_plain_loop(kind, data):
    check_greedy(model(kind), data.draw(configs(speculate=3)), data.draw(arrivals(COPIES, most=4)))


@settings(max_examples=5)
@given(config=configs(), script=arrivals(SEEDED, most=3), who=st.sampled_from(["oracle", "model", "itself", "n-gram"]))
def test_drawn_tokens_with_guesses_are_those_without(config, script, who):
    script = [replace(arrival, leaves=None) for arrival in script]
    draft = {
        "oracle": Oracle(model()), "model": ModelDraft(tiny(seed=3)), "itself": ModelDraft(model()), "n-gram": NGramDraft((1,)),
    }[who]  # fmt: skip
    plain = play(Engine(model(), config), script)
    guessed = play(Engine(model(), replace(config, speculate=3), draft=draft), script)
    assert {key: o.tokens for key, o in plain.items()} == {key: o.tokens for key, o in guessed.items()}


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_the_text_of_right_guesses_is_that_of_the_tokens(stop):
    """Bytes that are no characters come with the tokens that show it, those of a guess that ends the text too."""
    tokenizer = byte_tokenizer()
    lm = tiny(vocab_size=tokenizer.get_vocab_size())
    params = [SamplingParams(max_tokens=11, temperature=1.0, seed=seed, stop=stop) for seed in range(20)]
    plain, guessed = (
        play(
            Engine(lm, EngineConfig(rows=4, speculate=n), tokenizer, draft=ModelDraft(lm)),
            [Arrival(0, [1, 2], p) for p in params],
        )
        for n in (0, 4)
    )
    for key, outcome in plain.items():
        assert (outcome.tokens, outcome.text) == (guessed[key].tokens, guessed[key].text)


def test_right_guesses_save_steps():
    engine = Engine(model(), EngineConfig(speculate=4), draft=ModelDraft(model()))
    play(engine, [Arrival(0, [1, 2, 3], SamplingParams(max_tokens=26, temperature=1.0, seed=0))])
    assert engine.counters.right_guesses == engine.counters.guessed_tokens == 20 and engine.counters.steps <= 8


def test_guesses_end_where_the_text_does():
    """A stop token among right guesses ends the sequence there, and the state that is kept has read no more."""
    lm = model()
    plain = LLM(lm).generate([[1, 2]], SamplingParams(max_tokens=12), progress=False)[0].completions[0].tokens
    stop = plain[6]
    for speculate in (0, 5):
        engine = Engine(lm, EngineConfig(speculate=speculate), draft=ModelDraft(lm))
        engine.add(
            Request(id="a", tokens=[1, 2], params=SamplingParams(max_tokens=12, stop_tokens=(stop,)), keep_state=True)
        )
        outputs = []
        while engine.busy:
            outputs += engine.step()
        tokens = [output.token for output in outputs]
        assert tokens == plain[: plain.index(stop) + 1]
        assert int(outputs[-1].finish.state.tokens) == 2 + len(tokens) - 1
        again = (
            lm.generate(torch.tensor([tokens[-1:]]), state=outputs[-1].finish.state, max_new_tokens=4)
            .tokens[0]
            .tolist()
        )
        assert again == lm.generate(torch.tensor([[1, 2, *tokens]]), max_new_tokens=4).tokens[0].tolist()


def test_a_hybrid_with_guesses_ends_at_max_length():
    lm = model("hybrid")
    for speculate in (0, 4):
        llm = LLM(lm, config=EngineConfig(max_length=12, speculate=speculate), draft=ModelDraft(lm))
        assert len(llm.generate([[1] * 8], SamplingParams(max_tokens=100))[0].completions[0].tokens) == 5


def test_the_distribution_of_two_tokens_is_the_model_s():
    """5,000 draws with a draft that is often wrong: chi-square of the pair against the model's own probabilities."""
    torch.manual_seed(0)
    lm = tiny(vocab_size=5, tie_embeddings=False, layers=("mamba3",), d_intermediate=0)
    draft = tiny(vocab_size=5, tie_embeddings=False, layers=("mamba3",), d_intermediate=0, seed=1)
    engine = Engine(lm, EngineConfig(rows=500, queue=1000, speculate=2), draft=Half(draft))
    params = SamplingParams(max_tokens=3, temperature=0.7, n=50)
    counts = torch.zeros(5, 5, dtype=torch.float64)
    for seed in range(100):
        engine.add(Request(id=str(seed), tokens=[1], params=replace(params, seed=seed)))
    found: dict = {}
    while engine.busy:
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(output.token)
    for tokens in found.values():
        counts[tokens[0], tokens[1]] += 1
    with torch.no_grad():
        first = (lm(torch.tensor([[1]]))[0, -1, :5] / 0.7).softmax(-1)
        second = (lm(torch.tensor([[1, t] for t in range(5)]))[:, -1, :5] / 0.7).softmax(-1)
    expected = first[:, None] * second * len(found)
    assert len(found) == 5000 and 0 < engine.counters.right_guesses < engine.counters.guessed_tokens
    assert float(((counts - expected) ** 2 / expected).sum()) < 51.2  # 24 degrees: p = 0.001


class Half:
    """A draft whose guesses do not see the noise: the likeliest token of another model, wrong about half of the time."""

    def __init__(self, lm):
        self.lm, self.known = lm, {}

    def propose(self, sequence, count):
        said = (*sequence.tokens.tolist(), *sequence.chosen)
        if said not in self.known:
            with torch.no_grad():
                self.known[said] = int(self.lm(torch.tensor([said]))[0, -1, :5].argmax())
        return [self.known[said]] * count


def test_n_grams_propose_what_followed_last():
    engine = Engine(model())
    engine.add(Request(id="a", tokens=[1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 8, 1, 2]))
    (sequence,) = engine._requests["a"]
    sequence.chosen = [3]
    draft = NGramDraft((3, 2))
    assert draft.propose(sequence, 2) == [5, 6] and draft.propose(sequence, 9) == [5, 6, 8, 1, 2, 3]
    sequence.chosen.append(4)
    assert draft.propose(sequence, 2) == [9, 1]
    sequence.chosen += [7, 7]
    assert draft.propose(sequence, 2) == []


def test_a_draft_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="A draft needs the model's vocabulary of 50 tokens; it has 60"):
        Engine(model(), EngineConfig(speculate=2), draft=ModelDraft(tiny(vocab_size=60)))
