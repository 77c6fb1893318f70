"""One continuation on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mamba3.engine.pace import Pace
from mamba3.engine.request import Request, TokenLogprob
from mamba3.engine.sampler import Draws
from mamba3.engine.text import ContinuationText
from mamba3.lm import LMState


class Stage(Enum):
    """waiting: for its turn. prompt: being read. running: has a row of the pool."""

    WAITING = "waiting"
    PROMPT = "prompt"
    RUNNING = "running"
    DONE = "done"


class Mark(NamedTuple):
    """A state from before a stop string began: it has read `tokens` of those chosen, which spell `characters`."""

    state: LMState
    tokens: int
    characters: int


@dataclass(eq=False)
class Sequence:
    """Continuation `index` of a request.

    read: tokens of the request that were read. state: what has read them, until the sequence has a row; it is never
    changed in place. logits [v]: of the next token, when they are known before it gets a row. last: the token chosen last,
    which was not read. chosen: all of them.
    """

    request: Request
    index: int
    tokens: np.ndarray  # of the request, int64
    draws: Draws
    text: ContinuationText | None = None
    stage: Stage = Stage.WAITING
    read: int = 0
    cached: int = 0
    state: LMState | None = None
    logits: Tensor | None = None
    chosen: list[int] = field(default_factory=list)
    since_admitted: int = 0
    cuts: list[int] = field(default_factory=list)  # positions in the prompt where a snapshot is taken, ascending
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)  # of the guesses made for it
    mark: Mark | None = None  # while what was said last may yet turn out to begin a stop string

    @property
    def last(self) -> int:
        return self.chosen[-1]

    @property
    def unread(self) -> int:
        """Tokens of the prompt still to read."""
        return len(self.tokens) - self.read

    @property
    def reads(self) -> bool:
        """Whether it has a prompt to read before it can choose a token."""
        return self.unread > 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.params.prompt_logprobs is not None

    def seen(self) -> list[int]:
        """Everything that the state in its row has read: history, prompt, and the tokens chosen but the last."""
        return [*self.request.history, *self.tokens.tolist(), *self.chosen[:-1]]
