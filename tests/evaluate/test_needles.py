"""Laws of needles: a sample holds its needle once, fills its length and no more, and depends on its seed alone."""

import re

import pytest

from mamba3.evaluate import needles

PROSE = [f"Sentence number {i} says that {'very ' * (i % 5)}little happens." for i in range(300)]


def count(text):
    return len(text.split())


@pytest.mark.parametrize("kind", needles.KINDS)
@pytest.mark.parametrize("length", [200, 1024, 2048])
def test_a_sample_is_full_and_fits(kind, length):
    piece = count(needles.GRASS) if kind == 1 else max(map(count, PROSE))
    for seed in range(8):
        sample = needles.draw(kind, length, seed, count, PROSE)
        assert sample.tokens == count(f"{sample.prompt} {sample.answer_prefix}")
        assert length - needles.ANSWER_TOKENS - piece < sample.tokens <= length - needles.ANSWER_TOKENS
        assert sample.prompt.count(sample.value) == 1
        assert sample == needles.draw(kind, length, seed, count, PROSE)


UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.mark.parametrize(
    ("kind", "what", "value"), [(1, "number", r"\d{7}"), (2, "number", r"\d{7}"), (3, "uuid", UUID)]
)
def test_the_texts_are_the_tasks(kind, what, value):
    sample = needles.draw(kind, 400, 3, count, PROSE)
    assert re.fullmatch(value, sample.value)
    key = re.search(r"for (\w+-\w+) mentioned in the provided text is$", sample.answer_prefix)[1]
    assert f"One of the special magic {what}s for {key} is: {sample.value}." in sample.prompt
    assert sample.prompt.startswith(
        f"A special magic {what} is hidden within the following text. Make sure to memorize it."
    )
    assert sample.prompt.endswith(f"\nWhat is the special magic {what} for {key} mentioned in the provided text?")
    adjective, noun = key.split("-")
    assert adjective in needles.words("adjectives") and noun in needles.words("nouns")
    haystack = sample.prompt.split("\n", 1)[1].rsplit("\n", 1)[0]
    if kind == 1:
        lines = haystack.split("\n")
        assert set(lines) == {needles.GRASS, f"One of the special magic {what}s for {key} is: {sample.value}."}
    else:
        assert "\n" not in haystack and haystack.count("Sentence number") > 20


def test_depths_reach_from_the_first_sentence_to_the_last():
    samples = [needles.draw(2, 300, seed, count, PROSE) for seed in range(300)]
    depths = {round(sample.depth * 39, 9) for sample in samples}
    assert depths <= set(range(40)) and {0.0, 39.0} <= depths
    first, last = (next(s for s in samples if s.depth == depth) for depth in (0, 1))
    assert "afterwards.\nOne of the special" in first.prompt
    assert re.search(r"is: \d+\.\nWhat is the special", last.prompt)
    assert len({s.value for s in samples}) > 290 and len({s.answer_prefix for s in samples}) > 200


def test_words_and_sentences():
    for name in ("adjectives", "nouns"):
        words = needles.words(name)
        assert len(words) == len(set(words)) > 150 and all(re.fullmatch("[a-z]+", word) for word in words)
    text = 'One here.  Two\nthere! "Three?" Four 3.5 of it (yes.) Five'
    assert needles.sentences(text) == ["One here.", "Two there!", '"Three?"', "Four 3.5 of it (yes.)", "Five"]


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="lie in prose"):
        needles.draw(2, 400, 0, count)
    with pytest.raises(ValueError, match="kind 1, 2 and 3"):
        needles.draw(4, 400, 0, count, PROSE)
    with pytest.raises(ValueError, match="leaves no room"):
        needles.draw(1, 150, 0, count)
    assert needles.score("It is 1234567.", "1234567") == 1
    assert needles.score("ABCD-EF", "abcd-ef") == 1
    assert needles.score("123456", "1234567") == 0
