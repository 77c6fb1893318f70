"""What speculation gains: one stream with guesses and without, in turns, for random weights and for the model that ships.

Two kinds of text for the model that ships: what repeats itself or its prompt (the likeliest tokens of a list, of a page that
stands there twice, of a story, which small models soon say again), and what does not (stories drawn with a temperature).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import mamba3
from benchmarks.checks import Refused
from benchmarks.results import Tell
from mamba3 import Mamba3LM
from mamba3.engine import Engine, EngineConfig, ModelDraft, Proposer, Request, SamplingParams

_ROUNDS = 3
_BOOKS = Path(mamba3.__file__).parent / "data" / "books"
_STORY = (
    "The old house had been empty since the autumn, and nobody in the village could say who held the key. On the first "
    "morning of the new year the doctor saw smoke above the chimney. He stopped his horse, looked up at the windows, and"
)
_PAGE = (
    "The captain opened the letter and read it aloud. Your brother is well, it said; the ship came in on Tuesday with all "
    "hands, and the cargo is sold. He folded the letter and put it into his pocket.\n\n"
)
_LIST = "".join(
    f"{i}. Chapter the {name}. Mr. Brown goes to {place}, and comes home.\n"
    for i, (name, place) in enumerate([("first", "London"), ("second", "Paris"), ("third", "Rome")], 1)
)
TEXTS = {
    "repeats": {"a list": _LIST + "4. Chapter the", "a page twice": 2 * _PAGE + "The captain", "a story": _STORY},
    "does not repeat": {
        "a story": _STORY,
        "a page": _PAGE,
        "a talk": '"And where," said the doctor, "is the child now?"',
    },
}
CHOICES = {"repeats": {}, "does not repeat": {"temperature": 0.8, "top_p": 0.95, "seed": 0}}


def speculation(model: Mamba3LM, tokens: int, books: bool, tell: Tell) -> dict[str, Any]:
    """Tokens a second, share of right guesses and steps, by weights and text; `gain` is the median of each round's."""
    prompt = list(range(16)) * 4
    itself = {
        "n-grams": (4, None),
        "the model itself": (4, ModelDraft(model)),
    }  # the most that right guesses save in calls
    tell("random weights")
    found = {"random weights": _race(model, {"tokens": prompt}, itself, 4 * tokens, {})}
    if not books:
        return found
    tokenizer, device = Tokenizer.from_file(str(_BOOKS / "tokenizer.json")), model.embedding.weight.device
    for dtype in (torch.float32, torch.bfloat16):
        shipped = Mamba3LM.from_pretrained(_BOOKS, device=device, dtype=dtype).eval()
        for kind, texts in TEXTS.items():
            name = f"books, {str(dtype).removeprefix('torch.')}: {kind}"
            tell(name)
            prompts = {text: tokenizer.encode(words).ids for text, words in texts.items()}
            guessers = {"n-grams, 4": (4, None), "n-grams, 8": (8, None)}
            found[name] = _race(shipped, prompts, guessers, 2 * tokens, CHOICES[kind])
    return found


def _race(
    model: Mamba3LM,
    prompts: dict[str, list[int]],
    guessers: dict[str, tuple[int, Proposer | None]],
    tokens: int,
    choice: dict[str, Any],
) -> dict[str, Any]:
    """Nobody guessing and each of the guessers, one after another for every prompt and round; the first round warms up.

    Refused where guesses change the tokens of float32 or wider; in 16 bits rounding decides between tokens now and then, and
    `same` is the share of tokens before it first does.
    """
    contestants = {"none": (0, None), **guessers}
    seconds = {name: [0.0] * (_ROUNDS + 1) for name in contestants}
    said: dict[str, dict[str, list[int]]] = {name: {} for name in contestants}
    totals = {name: torch.zeros(3, dtype=torch.int64) for name in contestants}
    for turn in range(_ROUNDS + 1):
        for text, prompt in prompts.items():
            for name, (count, draft) in contestants.items():
                engine, took, said[name][text] = _say(model, prompt, count, draft, tokens, choice)
                seconds[name][turn] += took
                counters = engine.counters
                totals[name] += torch.tensor([counters.guessed_tokens, counters.right_guesses, counters.steps])
    found: dict[str, Any] = {}
    for name in contestants:
        pairs = [pair for text in prompts for pair in zip(said["none"][text], said[name][text], strict=True)]
        if model.embedding.weight.element_size() >= 4 and any(a != b for a, b in pairs):
            raise Refused("speculation changed the tokens")
        guessed, right, steps = (totals[name] // (_ROUNDS + 1)).tolist()
        rounds = list(zip(seconds["none"][1:], seconds[name][1:], strict=True))
        gains = sorted(none / mine for none, mine in rounds)
        found[name] = {
            "tokens_per_s": len(prompts) * tokens / statistics.median(mine for _, mine in rounds),
            "right_guesses": right / guessed if guessed else 0.0, "guessed": guessed, "steps": steps,
        }  # fmt: skip
        if name != "none":
            same = [_same(said["none"][text], said[name][text]) for text in prompts]
            found[name] |= {"gain": statistics.median(gains), "gains": gains, "same": statistics.mean(same)}
    return found


def _say(
    model: Mamba3LM, prompt: list[int], count: int, draft: Proposer | None, tokens: int, choice: dict[str, Any]
) -> tuple[Engine, float, list[int]]:
    """The engine that continued the prompt, the seconds after the first token, and all tokens."""
    engine = Engine(model, EngineConfig(rows=1, cache_bytes=0, speculate=count), draft=draft)
    engine.add(Request(id="a", tokens=prompt, params=SamplingParams(max_tokens=1 + tokens, ignore_end=True, **choice)))
    said: list[int] = []
    while not said:
        said += [output.token for output in engine.step() if output.token is not None]
    began = time.perf_counter()
    while engine.busy:
        said += [output.token for output in engine.step() if output.token is not None]
    return engine, time.perf_counter() - began, said


def _same(plain: list[int], guessed: list[int]) -> float:
    """The share of tokens before the first that differs."""
    return next((i for i, pair in enumerate(zip(plain, guessed, strict=True)) if pair[0] != pair[1]), len(plain)) / len(
        plain
    )
