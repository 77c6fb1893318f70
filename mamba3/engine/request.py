"""What is asked of an engine and what comes back: settings, requests, outputs token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mamba3.lm import LMState
from mamba3.lm.generate import Sampling

MAX_TOP_LOGPROBS = 20
FinishReason = Literal["stop", "length", "aborted"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a prompt is continued. Penalties and bias apply to the logits first, then the filters of `lm.generate.Sampling`."""

    max_tokens: int = 128  # tokens chosen at most; 0: only read the prompt
    n: int = 1  # continuations of the one prompt, which is read once
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and continuation
    presence_penalty: float = 0.0  # subtracted from logits of tokens that the continuation holds
    frequency_penalty: float = 0.0  # subtracted as often as the continuation holds them
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    seed: int | None = None  # the same seed gives the same tokens whatever else the engine does; None: a new one
    stop: tuple[str, ...] = ()  # texts before which the continuation ends
    stop_tokens: tuple[int, ...] = ()  # tokens after which it ends, beside the engine's end token
    ignore_end: bool = False  # go on after the engine's end token
    logprobs: int | None = None  # log probability of each token chosen, and of so many likeliest ones
    prompt_logprobs: int | None = None  # the same for the prompt's tokens; the prompt is then read in full

    def __post_init__(self):
        self.filters  # noqa: B018 (its laws are checked when it is made)
        laws = {
            "max_tokens must be >= 0": self.max_tokens >= 0,
            "n must be >= 1": self.n >= 1,
            "presence_penalty must lie in [-2, 2]": -2 <= self.presence_penalty <= 2,
            "frequency_penalty must lie in [-2, 2]": -2 <= self.frequency_penalty <= 2,
            f"logprobs must lie in [0, {MAX_TOP_LOGPROBS}]": 0 <= (self.logprobs or 0) <= MAX_TOP_LOGPROBS,
            f"prompt_logprobs must lie in [0, {MAX_TOP_LOGPROBS}]": 0
            <= (self.prompt_logprobs or 0)
            <= MAX_TOP_LOGPROBS,
            "stop must hold no empty text": all(self.stop),
        }
        for law, holds in laws.items():
            if not holds:
                raise ValueError(f"{law}; it is {getattr(self, law.split()[0])}.")

    @property
    def filters(self) -> Sampling:
        """Temperature and filters, as the plain loop applies them."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


@dataclass(kw_only=True)
class Request:
    """tokens to read, then continue. `start` is a state (of one sequence) that has read `history`; it is not changed.

    owner: whose request it is; waiting owners take turns, and each has a queue of its own. user: one of the owner's, who
    take turns within it. The prefix cache of one is closed to the others.
    keep_state: give the state back at the end; it has read everything but the last token chosen, or, where a stop string
    ended the continuation, what came before that.
    """

    id: str
    tokens: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    start: LMState | None = None
    history: Sequence[int] = ()
    owner: str = ""
    user: str = ""
    keep_state: bool = False

    @property
    def reader(self) -> str:
        """Whose prefix cache it reads."""
        return f"{self.owner}\0{self.user}" if self.user else self.owner


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability before temperature and filters, and the likeliest tokens' beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finish:
    """Why a continuation ended; state: what `keep_state` asked for, which has read `tokens` of those chosen.

    These spell the first `characters` of the text; what follows them was cut by a stop string, or there is nothing more.
    """

    reason: FinishReason
    state: LMState | None = None
    tokens: int = 0
    characters: int = 0


@dataclass(frozen=True)
class Output:
    """One token of continuation `index`, or its end, or both. text: what can be shown now (see `text.stream`).

    cached: tokens of the prompt that were not read because a snapshot had. prompt: what `prompt_logprobs` asked for, with
    the first output of each continuation.
    """

    request_id: str
    index: int
    token: int | None
    text: str = ""
    logprob: TokenLogprob | None = None
    finish: Finish | None = None
    cached: int = 0
    prompt: tuple[TokenLogprob | None, ...] = ()
