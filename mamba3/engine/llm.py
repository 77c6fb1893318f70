"""Many prompts at once, without a server: `LLM(model, tokenizer).generate(prompts, params)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from mamba3.engine.config import EngineConfig
from mamba3.engine.draft import Proposer
from mamba3.engine.engine import Engine
from mamba3.engine.request import Output, Request, SamplingParams, TokenLogprob
from mamba3.lm import Mamba3LM
from mamba3.text.encode import encode, end_of_text

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """One continuation: its tokens (a stop token included), their text (without), why it ended."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, output: Output) -> None:
        """What the engine gave out for this continuation."""
        if output.token is not None:
            self.tokens.append(output.token)
        if output.logprob is not None:
            self.logprobs.append(output.logprob)
        self.text += output.text
        if output.finish is not None:
            self.finish_reason = output.finish.reason


@dataclass
class Result:
    """A prompt's continuations; cached: prompt tokens that a snapshot spared reading."""

    prompt: list[int]
    completions: list[Completion]
    cached: int = 0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)


class LLM:
    """A model for offline use. Without a tokenizer prompts are tokens, and so are the continuations."""

    def __init__(
        self,
        model: Mamba3LM,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        draft: Proposer | None = None,
    ):
        self.tokenizer = tokenizer
        self.end_token = None if tokenizer is None else end_of_text(tokenizer)
        self.engine = Engine(model, config, tokenizer, self.end_token, draft)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Result]:
        """Continue each prompt; the results are in the order of the prompts.

        params: for all, or one for each. progress: a bar on stderr, where that is a terminal. Raises ValueError for prompts
        that cannot be served, before any is.
        """
        every = (
            [params] * len(prompts)
            if isinstance(params, SamplingParams)
            else params or [SamplingParams()] * len(prompts)
        )
        if len(every) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts came with {len(every)} params; give one for all, or one for each."
            )
        requests = [
            Request(id=str(i), tokens=self._tokens(prompt), params=settings)
            for i, (prompt, settings) in enumerate(zip(prompts, every, strict=True))
        ]
        for request in requests:
            self.engine.check(request)
        results = [Result(list(r.tokens), [Completion() for _ in range(r.params.n)]) for r in requests]
        with _bar(len(requests), progress) as advance:
            try:
                self._run(requests, results, advance)
            finally:  # an interrupted call leaves nothing behind
                for request in requests:
                    self.engine.abort(request.id)
        return results

    def _run(self, requests: list[Request], results: list[Result], advance) -> None:
        coming, left = iter(requests), {r.id: r.params.n for r in requests}
        while left:
            while self.engine.has_room() and (request := next(coming, None)) is not None:
                self.engine.add(request)
            for output in self.engine.step():
                result = results[int(output.request_id)]
                result.completions[output.index].add(output)
                result.cached = max(result.cached, output.cached)
                result.prompt_logprobs = list(output.prompt) or result.prompt_logprobs  # the same of each continuation
                if output.finish is not None:
                    left[output.request_id] -= 1
                    if not left[output.request_id]:
                        del left[output.request_id]
                        advance()

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None or self.end_token is None:
            raise ValueError("A prompt that is text needs a tokenizer; give one to LLM, or give tokens.")
        return encode(self.tokenizer, [prompt])[0].tolist() or [self.end_token]  # documents begin after one


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator:
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
