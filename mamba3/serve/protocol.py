"""What requests may hold, after OpenAI's API. A field that this server does not know is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from mamba3.engine import SamplingParams

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """JSON of a request: strict types, no unknown fields; a field that is null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class StreamOptions(Body):
    include_usage: bool = False


class TextFormat(Body):
    type: Literal["text"]


class Generation(Body):
    """What both kinds of completion share; top_k, min_p, repetition_penalty and session are ours."""

    model: str
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Bias] = {}
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=256)] = (
        ""  # shares the key's turns and has a prefix cache of its own
    )
    session: Name | None = None  # what is said goes on from here, and the session goes on from what is said

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.session is not None and self.n > 1:
            raise ValueError("a session goes on in one way: n must be 1 (fork the session for more)")
        return self

    def sampling(self, max_tokens: int, stops: tuple[str, ...] = (), **more: Any) -> SamplingParams:
        """The engine's settings."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=max_tokens, n=self.n, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            min_p=self.min_p, repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, seed=self.seed, stop=stop + stops,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()), **more,
        )  # fmt: skip


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of other than n is not supported")
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        if several and len(self.prompt) * self.n > 128:
            raise ValueError("a request may have at most 128 continuations, prompts times n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 makes sense with echo=true alone")
        if self.session is not None and (self.echo or isinstance(self.prompt, list)):
            raise ValueError("a session takes one prompt, a text, without echo")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message; developer is read as system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """What a template reads."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **named}


class ChatBody(Generation):
    """POST /v1/chat/completions. With a session, messages are what is new."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] = False

    @model_validator(mode="after")
    def _tops_need_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things; give the second alone")
        return self


class NewSession(Body):
    """POST /v1/sessions. id: a name, if it shall not be a random one."""

    id: Name | None = None


class ForkSession(Body):
    """POST /v1/sessions/{id}/fork. turn: fork as things stood after so many turns."""

    id: Name | None = None
    turn: Annotated[int, Field(ge=0, le=2**31)] | None = None


class RewindSession(Body):
    """POST /v1/sessions/{id}/rewind: forget what came after so many turns."""

    turn: Annotated[int, Field(ge=0, le=2**31)]


class SessionObject(BaseModel):
    """A session as the API shows it. bytes: of its states in memory, or of its file when it is parked."""

    id: str
    object: Literal["session"] = "session"
    tokens: int
    turns: int
    bytes: int
    parked: bool


class SessionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SessionObject]


class Deleted(BaseModel):
    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True


class Health(BaseModel):
    """status: ok, or draining while the server ends."""

    status: Literal["ok", "draining"]
