"""POST /v1/completions: text that goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from mamba3.engine import Output, TokenLogprob
from mamba3.serve.generation import Choice
from mamba3.serve.service import Service


class Chunk(Completion):
    """A part of a streamed completion: choices may not have ended yet."""

    choices: list[CompletionChoice]


class TextShape:
    """The `text_completion` objects. echo: the text of each prompt, given back before its continuation."""

    def __init__(self, service: Service, id: str, logprobs: int | None, echo: Sequence[str] | None = None):
        self.service, self.logprobs, self.echo = service, logprobs, echo
        self._head = {
            "id": id,
            "created": int(time.time()),
            "model": service.config.model_name,
            "object": "text_completion",
        }
        self._offsets: dict[int, int] = {}

    def opening(self, choice: Choice) -> BaseModel | None:
        """The prompt, if it is echoed."""
        if self.echo is None:
            return None
        prompt = self.echo[choice.prompt]
        logprobs = None
        if self.logprobs is not None:
            logprobs = self._logprobs(choice.prompt_logprobs, 0, choice.prompt)
        self._offsets[choice.index] = len(prompt)
        return self._chunk(choice, prompt, logprobs, None)

    def chunk(self, choice: Choice, output: Output) -> BaseModel:
        logprobs, offset = None, self._offsets.get(choice.index, 0)
        if self.logprobs is not None and output.logprob is not None:
            logprobs = self._logprobs((output.logprob,), offset)
            self._offsets[choice.index] = offset + len(logprobs.tokens[0] if logprobs.tokens else "")
        return self._chunk(choice, output.text, logprobs, choice.reason)

    def usage_chunk(self, usage: CompletionUsage) -> BaseModel:
        return Chunk.model_construct(**self._head, choices=[], usage=usage)

    def whole(self, choices: Sequence[Choice], usage: CompletionUsage) -> BaseModel:
        found = []
        for choice in choices:
            prompt = "" if self.echo is None else self.echo[choice.prompt]
            logprobs = None
            if self.logprobs is not None:
                logprobs = self._logprobs((*choice.prompt_logprobs, *choice.logprobs), 0, choice.prompt)
            reason = "stop" if choice.reason == "stop" else "length"
            text = prompt + choice.text
            found.append(CompletionChoice(finish_reason=reason, index=choice.index, logprobs=logprobs, text=text))
        return Completion.model_validate({**self._head, "choices": found, "usage": usage})

    def _chunk(self, choice: Choice, text: str, logprobs: Logprobs | None, reason: str | None) -> BaseModel:
        part = CompletionChoice.model_construct(index=choice.index, text=text, logprobs=logprobs, finish_reason=reason)
        return Chunk.model_construct(**self._head, choices=[part])

    def _logprobs(self, found: Sequence[TokenLogprob | None], offset: int, prompt: int = 0) -> Logprobs:
        """The four lists; the first token of a prompt has no probability."""
        tokens, values, tops, offsets = [], [], [], []
        for entry in found:
            token = self.first_tokens[prompt] if entry is None else entry.token
            text = token_text(self.service, token)
            tokens.append(text)
            values.append(None if entry is None else entry.logprob)
            tops.append(None if entry is None else {token_text(self.service, t): v for t, v in entry.top})
            offsets.append(offset)
            offset += len(text)
        return Logprobs.model_construct(tokens=tokens, token_logprobs=values, top_logprobs=tops, text_offset=offsets)

    first_tokens: Sequence[int] = ()  # of each prompt


def token_bytes(service: Service, token: int) -> bytes | None:
    """What a token stands for; None where tokens are not pieces of bytes."""
    if service.pieces is None:
        return None
    return service.pieces[token] or (service.tokenizer.id_to_token(token) or "").encode()


def token_text(service: Service, token: int) -> str:
    """A token as text; bytes that are no character are spelled as bytes:\\x.. ."""
    piece = token_bytes(service, token)
    if piece is None:
        return service.tokenizer.decode([token], skip_special_tokens=False)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
