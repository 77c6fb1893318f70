"""A needle in a haystack, single, three kinds (RULER, Hsieh et al. 2024, tasks niah_single_1 to 3): one sentence in a long
text gives a number or a UUID a name, and the question at the end asks for it.

    kind   haystack                              value
    1      one line about grass, repeated        7 digits
    2      prose                                 7 digits
    3      prose                                 a UUID of version 4

Templates, names of the form adjective-noun, 40 depths and 128 answer tokens are the harness's. Ours are the lists of words,
the prose, and that a sample fills its length to the last line or sentence. Law: prompt and answer prefix have at most
length - 128 tokens, one more piece of haystack would not fit, and a sample depends on its seed alone.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Sequence
from importlib import resources
from typing import NamedTuple

KINDS = (1, 2, 3)
LENGTHS = (1024, 2048, 4096)
SAMPLES, ANSWER_TOKENS, DEPTHS = 500, 128, 40
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {what}s for {key} is: {value}."
PROMPT = (
    "A special magic {what} is hidden within the following text. Make sure to memorize it. I will quiz you about the {what} "
    "afterwards.\n{context}\nWhat is the special magic {what} for {key} mentioned in the provided text?"
)
ANSWER = "The special magic {what} for {key} mentioned in the provided text is"
Count = Callable[[str], int]


class Sample(NamedTuple):
    """prompt, answer_prefix: what the model reads, with a space between. value: what it shall say. length: nominal.

    depth: the needle's place as a share of the haystack. tokens: of prompt and answer prefix.
    """

    prompt: str
    answer_prefix: str
    value: str
    length: int
    depth: float
    tokens: int


def sentences(text: str) -> list[str]:
    """The sentences of a prose text, white space normalised."""
    return re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+", re.sub(r"\s+", " ", text).strip())


def draw(kind: int, length: int, seed: int, count: Count, prose: Sequence[str] = ()) -> Sample:
    """One sample.

    count: tokens of a text. prose: sentences, read on from a place that the seed draws, and from the start again at the end.
    ValueError when there is no prose for kinds 2 and 3, or the length leaves no room for the question.
    """
    if kind not in KINDS:
        raise ValueError(f"There are needles of kind 1, 2 and 3; {kind!r} came.")
    if kind != 1 and not prose:
        raise ValueError("Needles of kind 2 and 3 lie in prose; give its sentences.")
    chance = random.Random(f"{kind} {length} {seed}")
    what = "uuid" if kind == 3 else "number"
    key = f"{chance.choice(words('adjectives'))}-{chance.choice(words('nouns'))}"
    value = str(uuid.UUID(int=chance.getrandbits(128), version=4))
    value = value if kind == 3 else str(chance.randrange(10**6, 10**7))
    depth = chance.randrange(DEPTHS) / (DEPTHS - 1) if kind != 1 else chance.random()
    start = chance.randrange(len(prose)) if kind != 1 else 0
    needle = NEEDLE.format(what=what, key=key, value=value)
    prefix = ANSWER.format(what=what, key=key)

    def prompt(pieces: int) -> str:
        hay = [GRASS if kind == 1 else prose[(start + i) % len(prose)] for i in range(pieces)]
        hay.insert(int(depth * pieces), needle)
        return PROMPT.format(what=what, key=key, context=("\n" if kind == 1 else " ").join(hay))

    pieces = _most(lambda pieces: count(f"{prompt(pieces)} {prefix}") <= length - ANSWER_TOKENS)
    if pieces < 0:
        raise ValueError(
            f"A length of {length} tokens leaves no room for a needle, its question and {ANSWER_TOKENS} more."
        )
    return Sample(prompt(pieces), prefix, value, length, depth, count(f"{prompt(pieces)} {prefix}"))


def score(answer: str, value: str) -> float:
    """1 if the answer contains the value, in capitals or not, else 0."""
    return float(value.lower() in answer.lower())


def words(name: str) -> list[str]:
    """One of the lists that names are made of, adjectives or nouns."""
    return resources.files("mamba3.evaluate").joinpath(f"{name}.txt").read_text(encoding="utf-8").split()


def _most(fits: Callable[[int], bool]) -> int:
    """The largest n >= 0 that fits, where every smaller one does too; -1 when none does."""
    low, high = -1, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
