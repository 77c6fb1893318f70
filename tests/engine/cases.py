"""Models, scripts of arrivals and the plain loop that the engine is held to."""

from dataclasses import dataclass, field
from functools import cache

import torch
from hypothesis import strategies as st

from mamba3.engine import Engine, EngineConfig, Finish, Output, Request, SamplingParams, TokenLogprob
from tests.lm.test_model import tiny

VOCABULARY = 50


@cache
def model(kind: str = "siso", dtype: torch.dtype = torch.float64):
    """Shared: an engine changes no weight."""
    return tiny(kind, dtype=dtype).eval()


def greedy(lm, prompt: list[int], count: int, piece: int = 2048) -> list[int]:
    """The plain loop's tokens."""
    return list(_greedy(lm, tuple(prompt), count, piece))


@cache
def _greedy(lm, prompt: tuple[int, ...], count: int, piece: int) -> list[int]:
    return lm.generate(torch.tensor([prompt]), max_new_tokens=count, prefill_chunk=piece).tokens[0].tolist()


@dataclass
class Arrival:
    """A request that comes before step `at` and, where `leaves` says so, goes away so many steps later."""

    at: int
    prompt: list[int]
    params: SamplingParams
    owner: str = ""
    leaves: int | None = None
    keeps: bool = False  # wants its state back


@dataclass
class Outcome:
    """What came out for one continuation."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    cached: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, output: Output) -> None:
        assert self.finish is None, "something came after the end"
        if output.token is not None:
            self.tokens.append(output.token)
        if output.logprob is not None:
            self.logprobs.append(output.logprob)
        self.text += output.text
        self.finish, self.cached = output.finish, output.cached


def play(engine: Engine, arrivals: list[Arrival], steps: int = 5000) -> dict[tuple[int, int], Outcome]:
    """Let the requests come and go; outcomes by (arrival, continuation)."""
    outcomes: dict[tuple[int, int], Outcome] = {}
    for now in range(steps):
        outputs = []
        for i, arrival in enumerate(arrivals):
            if arrival.at == now:
                engine.add(
                    Request(
                        id=str(i),
                        tokens=arrival.prompt,
                        params=arrival.params,
                        owner=arrival.owner,
                        keep_state=arrival.keeps,
                    )
                )
            if arrival.leaves is not None and arrival.at + arrival.leaves == now:
                outputs += engine.abort(str(i))
        if engine.busy:
            outputs += engine.step()
        for output in outputs:
            outcomes.setdefault((int(output.request_id), output.index), Outcome()).add(output)
        if not engine.busy and now > max((a.at for a in arrivals), default=0):
            break
    assert not engine.busy and engine.pool.used == 0
    return outcomes


def prompts(longest: int = 24):
    """Prompts of few distinct tokens that often begin alike, so that the cache is hit."""
    stem = [7, 3, 7, 7, 1, 3, 9, 4] * 5
    cut = st.tuples(st.integers(0, longest - 4), st.lists(st.sampled_from([1, 3, 7, 9]), min_size=1, max_size=4))
    return cut.map(lambda pair: stem[: pair[0]] + pair[1])


def arrivals(params, most: int = 6):
    """Scripts of requests by two owners, some of whom go away."""
    one = st.builds(
        Arrival, st.integers(0, 25), prompts(), params, st.sampled_from(["", "other"]),
        st.one_of(st.none(), st.none(), st.integers(0, 12)),
    )  # fmt: skip
    return st.lists(one, min_size=1, max_size=most)


def configs(**fixed):
    """Engines that are cramped in every way."""
    fields = {
        "rows": st.integers(1, 4),
        "queue": st.just(100),
        "prefill_chunk": st.sampled_from([2, 5, 7, 64]),
        "step_tokens": st.sampled_from([3, 12, 64]),
        "prompts": st.integers(1, 3),
        "quantum": st.sampled_from([None, 1, 3]),
        "cache_bytes": st.sampled_from([0, 30_000, 2**24]),
        "cache_grid": st.sampled_from([5, 64]),
    }
    return st.builds(EngineConfig, **(fields | {name: st.just(value) for name, value in fixed.items()}))
