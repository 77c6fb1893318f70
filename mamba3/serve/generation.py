"""From a request to an answer, whole or streamed; the two shapes of answer differ in `completions` and `chat`."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event
from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from mamba3.engine import Output, Request, Session, Speech, TokenLogprob
from mamba3.serve.errors import body_of, error_of, of_the_caller
from mamba3.serve.service import Service

T = TypeVar("T")
_log = logging.getLogger("mamba3.serve")
_GONE = 499  # what the log says of a request whose client left; nobody is told


@dataclass
class Choice:
    """One continuation as far as it is known: `index` counts over all prompts."""

    prompt: int
    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    reason: str | None = None
    last: float | None = None  # when its last token came


class Shape(Protocol):
    """How choices become JSON."""

    def opening(self, choice: Choice) -> BaseModel | None:
        """A first chunk."""

    def chunk(self, choice: Choice, output: Output) -> BaseModel:
        """What an output adds."""
        ...

    def usage_chunk(self, usage: CompletionUsage) -> BaseModel:
        """The last chunk."""
        ...

    def whole(self, choices: Sequence[Choice], usage: CompletionUsage) -> BaseModel:
        """The answer in one piece."""
        ...


@dataclass
class Job:
    """Everything about one HTTP request that generates. said: the text of what is new in the session."""

    service: Service
    http: HTTPRequest
    requests: list[Request]
    shape: Shape
    session: Session | None = None
    said: str = ""
    began: float = field(default_factory=time.perf_counter)
    gone: bool = False

    def __post_init__(self):
        self.choices = [
            Choice(p, p * r.params.n + i) for p, r in enumerate(self.requests) for i in range(r.params.n)
        ]  # fmt: skip
        self.cached = [len(r.history) for r in self.requests]
        with of_the_caller():
            for request in self.requests:
                self.service.engine.check(request)

    @property
    def usage(self) -> CompletionUsage:
        """Tokens of each prompt count once, however many continuations it has."""
        prompt = sum(len(r.history) + len(r.tokens) for r in self.requests)
        chosen = sum(len(choice.tokens) for choice in self.choices)
        details = PromptTokensDetails(cached_tokens=sum(self.cached))
        return CompletionUsage(
            prompt_tokens=prompt, completion_tokens=chosen, total_tokens=prompt + chosen, prompt_tokens_details=details
        )

    async def outputs(self) -> AsyncGenerator[tuple[Choice, Output], None]:
        """Outputs of all prompts as they come, written into their choices."""
        async with aclosing(_merge(self.service, self.requests)) as merged:
            async for prompt, output in merged:
                choice = self.choices[prompt * self.requests[prompt].params.n + output.index]
                self._note(choice, output)
                yield choice, output
        self._end()

    def _note(self, choice: Choice, output: Output) -> None:
        now, metrics = time.perf_counter(), self.service.metrics
        choice.text += output.text
        choice.prompt_logprobs += output.prompt
        self.cached[choice.prompt] = max(self.cached[choice.prompt], output.cached)
        if output.token is not None:
            choice.tokens.append(output.token)
            if choice.last is None:
                metrics.first_token.observe(now - self.began)
            else:
                metrics.between_tokens.observe(now - choice.last)
            choice.last = now
        if output.logprob is not None:
            choice.logprobs.append(output.logprob)
        if output.finish is not None:
            choice.reason = output.finish.reason
            if self.session is not None:
                service = self.service
                speech, keep = Speech(service.tokenizer, service.end_token), service.sessions.keep_turns
                self.session.add_reply(
                    self.requests[0], self.said, choice.tokens, choice.text, output.finish, speech, keep
                )

    def note_gone(self) -> None:
        """The client has left; the log and the metrics hear of it once."""
        if not self.gone:
            self.service.metrics.aborted.inc()
            self.http.state.facts = {"status": _GONE}
        self.gone = True

    def _end(self) -> None:
        usage, metrics = self.usage, self.service.metrics
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(sum(self.cached))
        metrics.completion_tokens.inc(usage.completion_tokens)
        self.http.state.facts = {
            "prompt_tokens": usage.prompt_tokens, "cached_tokens": sum(self.cached),
            "completion_tokens": usage.completion_tokens, "finish": [choice.reason for choice in self.choices],
        }  # fmt: skip


class _ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def answer(job: Job, stack: AsyncExitStack, stream: bool, include_usage: bool) -> Response:
    """The answer. `stack` holds what the job has entered; it is left when the answer has been given."""
    try:
        if not stream:
            async with stack:
                await _unless_gone(job, _collect(job))
            return _json(job.shape.whole(job.choices, job.usage))
        events = _events(job, stack, include_usage)
        first = await _unless_gone(job, anext(events))  # what fails here is an answer of its own, with its status
    except _ClientLeft:
        return Response(status_code=_GONE)

    async def body() -> AsyncGenerator[bytes, None]:
        try:
            yield first
            async for event in events:
                yield event
        finally:
            await events.aclose()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _collect(job: Job) -> None:
    async with aclosing(job.outputs()) as outputs:
        async for _ in outputs:
            pass


async def _unless_gone(job: Job, work: Awaitable[T]) -> T:
    """Do the work; when the client goes away before its end, stop it and raise _ClientLeft."""

    async def gone() -> None:
        while (await job.http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        job.note_gone()
        raise _ClientLeft
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _events(job: Job, stack: AsyncExitStack, include_usage: bool) -> AsyncGenerator[bytes, None]:
    complete = False
    try:
        async with stack, aclosing(job.outputs()) as outputs:
            opened: set[int] = set()
            async for choice, output in outputs:
                if choice.index not in opened:
                    opened.add(choice.index)
                    opening = job.shape.opening(choice)
                    if opening is not None:
                        yield _event(opening)
                if output.text or output.logprob is not None or output.finish is not None:
                    yield _event(job.shape.chunk(choice, output))
        if include_usage:
            yield _event(job.shape.usage_chunk(job.usage))
        complete = True
        yield format_sse_event(data_str="[DONE]")
    except Exception as error:
        if not any(choice.tokens for choice in job.choices):
            raise
        _log.error("a stream failed", exc_info=error)
        complete = True
        yield format_sse_event(data_str=json.dumps(body_of(error_of(error))))
    finally:
        if not complete:
            job.note_gone()


async def _merge(service: Service, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Output], None]:
    """Outputs of several requests in the order in which they come."""
    mail: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()

    async def follow(prompt: int, request: Request) -> None:
        try:
            async with aclosing(service.thread.stream(request)) as outputs:
                async for output in outputs:
                    mail.put_nowait((prompt, output))
            mail.put_nowait(None)
        except Exception as error:  # noqa: BLE001 (raised again where the outputs are read)
            mail.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(i, request)) for i, request in enumerate(requests)]
    left = len(tasks)
    try:
        while left:
            item = await mail.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _json(answer: BaseModel) -> JSONResponse:
    return JSONResponse(answer.model_dump(mode="json"))


def _event(chunk: BaseModel) -> bytes:
    return format_sse_event(data_str=chunk.model_dump_json(exclude_unset=True))
