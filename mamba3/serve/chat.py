"""POST /v1/chat/completions: messages, and a reply."""

from __future__ import annotations

import time
from collections.abc import Sequence

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice as WholeChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as PartChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as PartLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from pydantic import BaseModel

from mamba3.engine import Output, TokenLogprob
from mamba3.serve.completions import token_bytes, token_text
from mamba3.serve.generation import Choice
from mamba3.serve.service import Service


class ChatShape:
    """The `chat.completion` objects."""

    def __init__(self, service: Service, id: str):
        self.service = service
        self._head = {"id": id, "created": int(time.time()), "model": service.config.model_name}

    def opening(self, choice: Choice) -> BaseModel:
        """Who speaks."""
        return self._chunk(PartChoice(index=choice.index, delta=ChoiceDelta(role="assistant", content="")))

    def chunk(self, choice: Choice, output: Output) -> BaseModel:
        delta = ChoiceDelta(content=output.text) if output.text else ChoiceDelta()
        logprobs = None
        if output.logprob is not None:
            logprobs = PartLogprobs(content=[self._logprob(output.logprob)])
        reason = None if choice.reason is None else _reason(choice)
        return self._chunk(PartChoice(index=choice.index, delta=delta, finish_reason=reason, logprobs=logprobs))

    def usage_chunk(self, usage: CompletionUsage) -> BaseModel:
        return ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=[], usage=usage)

    def whole(self, choices: Sequence[Choice], usage: CompletionUsage) -> BaseModel:
        found = []
        for choice in choices:
            logprobs = None
            if choice.logprobs:
                logprobs = ChoiceLogprobs(content=[self._logprob(entry) for entry in choice.logprobs])
            message = ChatCompletionMessage(role="assistant", content=choice.text)
            found.append(
                WholeChoice(index=choice.index, message=message, finish_reason=_reason(choice), logprobs=logprobs)
            )
        return ChatCompletion(**self._head, object="chat.completion", choices=found, usage=usage)

    def _chunk(self, part: PartChoice) -> BaseModel:
        return ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=[part])

    def _logprob(self, entry: TokenLogprob) -> ChatCompletionTokenLogprob:
        tops = [TopLogprob(**self._spelled(token), logprob=value) for token, value in entry.top]
        return ChatCompletionTokenLogprob(**self._spelled(entry.token), logprob=entry.logprob, top_logprobs=tops)

    def _spelled(self, token: int) -> dict:
        piece = token_bytes(self.service, token)
        return {"token": token_text(self.service, token), "bytes": None if piece is None else list(piece)}


def _reason(choice: Choice):
    return "stop" if choice.reason == "stop" else "length"
