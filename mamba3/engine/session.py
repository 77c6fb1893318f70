"""A conversation that goes on: its tokens, its text, its turns, and states at the ends of turns.

A state is constant in size and never changed once it is here, so that a fork shares it and a rewind is a choice of an
earlier one. Lists are never changed either, but replaced: a copy of a session is a few references. Where the state of a
turn is not kept, the tokens since the last one that is are read again: a session always goes on as if it had never stopped.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mamba3.engine.request import Finish, Request, SamplingParams
from mamba3.lm import LMState, Mamba3LM
from mamba3.text.encode import encode

_RECORD = "session"  # the tensor that holds what is not a tensor, so that the checksum covers it
# What CPython takes at most: an integer and its place in a list, a turn with its two, an empty session with its names.
_TOKEN_BYTES, _TURN_BYTES, _SESSION_BYTES = 40, 128, 2048


@dataclass(frozen=True, slots=True)
class Turn:
    """How much of a session there was when a turn ended: tokens, characters."""

    tokens: int
    characters: int


class Speech(NamedTuple):
    """What is needed to write a reply down: the tokenizer, and the token that ends a text."""

    tokenizer: Tokenizer
    end_token: int


@dataclass
class Session:
    """tokens: everything said, the token chosen last included. text: the same as characters, special tokens spelled out.

    states: for some turns (0 is before the first), a state that has read `state.tokens` of the tokens. saved: whether its
    file says the same.
    """

    id: str
    owner: str = ""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    turns: list[Turn] = field(default_factory=list)
    states: dict[int, LMState] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    saved: bool = False

    @property
    def record_bytes(self) -> int:
        """Bytes of all but the states, at most: forks share lists until they differ."""
        spoken = _TOKEN_BYTES * len(self.tokens) + sys.getsizeof(self.text)
        return _SESSION_BYTES + spoken + _TURN_BYTES * len(self.turns)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory, the states that forks share counted here too."""
        return self.record_bytes + sum(state.nbytes for state in self.states.values())

    def copy(self) -> Session:
        """The session as it is now, whatever becomes of this one."""
        return replace(self)

    def restore(self, earlier: Session) -> None:
        """Be what a copy was."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(earlier, entry.name))

    def differs(self, earlier: Session) -> bool:
        """Whether a turn was added or taken back since a copy was made."""
        return self.turns is not earlier.turns

    def request(self, id: str, tokens: Sequence[int], params: SamplingParams) -> Request:
        """What reads the tokens after everything said so far and goes on from there."""
        state = self.states[max(self.states)] if self.states else None
        read = 0 if state is None else int(state.tokens)
        return Request(
            id=id, tokens=[*self.tokens[read:], *tokens], params=params, start=state, history=self.tokens[:read],
            owner=self.owner, keep_state=True,
        )  # fmt: skip

    def add_turn(self, tokens: Sequence[int], text: str, state: LMState | None, keep: int = 8) -> None:
        """What was read and chosen in a turn, and the state that has read it (some last tokens may be missing).

        Of the states those of the last `keep` turns stay.
        """
        whole, states = [*self.tokens, *tokens], dict(self.states)
        if state is not None:
            if int(state.tokens) > len(whole):
                raise ValueError(f"The state has read {int(state.tokens)} tokens of a session of {len(whole)}.")
            states[len(self.turns) + 1] = state
        self.tokens, self.text, self.saved = whole, self.text + text, False
        self.turns = [*self.turns, Turn(len(self.tokens), len(self.text))]
        self.states = {turn: states[turn] for turn in sorted(states)[-keep:]}

    def add_reply(
        self,
        request: Request,
        said: str,
        chosen: Sequence[int],
        text: str,
        finish: Finish,
        speech: Speech,
        keep: int = 8,
    ) -> None:
        """The turn of a `request` of this session: `said` was read, `chosen` came, of which `text` was shown.

        A reply that a stop string cut, or that was broken off, is kept as it was shown; the next turn reads again what the
        state has not read.
        """
        new = request.tokens[len(self.tokens) - len(request.history) :]
        state = finish.state
        if chosen and chosen[-1] == speech.end_token:
            text += speech.tokenizer.id_to_token(speech.end_token) or ""
        elif finish.reason != "length":
            rest = encode(speech.tokenizer, [text[finish.characters :]])[0].tolist()
            chosen = [*chosen[: finish.tokens], *rest]
        self.add_turn([*new, *chosen], said + text, state, keep)

    def rewind(self, turn: int) -> None:
        """Back to the end of a turn, counted from 1; 0 is before the first. ValueError when there is no such turn."""
        if not 0 <= turn <= len(self.turns):
            raise ValueError(f"turn must lie in [0, {len(self.turns)}], the turns of this session; it is {turn}.")
        end = self.turns[turn - 1] if turn else Turn(0, 0)
        self.tokens, self.text = self.tokens[: end.tokens], self.text[: end.characters]
        self.turns, self.saved = self.turns[:turn], False
        self.states = {t: state for t, state in self.states.items() if t <= turn}

    def forget_state(self) -> None:
        """Give up the earliest state that is kept; what it spared is read again when it is needed."""
        self.states = {turn: self.states[turn] for turn in sorted(self.states)[1:]}

    def fork(self, id: str) -> Session:
        """A session of its own with the same past. Nothing is copied: nothing is ever changed."""
        return replace(self, id=id, created=time.time(), saved=False)

    # -- as tensors

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Everything but the owner. dtype: of the matrix states S, which are nearly all of the bytes; as they are if None."""
        record = {
            "id": self.id, "text": self.text, "created": self.created,
            "turns": [[turn.tokens, turn.characters] for turn in self.turns],
        }  # fmt: skip
        tensors = {
            _RECORD: torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8),
            "ids": torch.tensor(self.tokens, dtype=torch.int64),
        }
        for turn, state in self.states.items():
            named = state.tensors(f"turns.{turn}.")
            tensors |= {n: v.to(dtype) if dtype and n.endswith(".S") else v for n, v in named.items()}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], model: Mamba3LM, owner: str = "") -> Session:
        """The inverse of `tensors`. ValueError where they are no session, or not one that this model can go on from."""
        try:
            record = json.loads(tensors[_RECORD].to(torch.uint8).numpy().tobytes())
            turns = [Turn(int(tokens), int(characters)) for tokens, characters in record["turns"]]
            session = cls(str(record["id"]), owner, tensors["ids"].tolist(), str(record["text"]), turns)
            session.created = float(record["created"])
            numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("turns.")})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"The file holds no session that can be read ({type(error).__name__}: {error})."
            ) from error
        _check_record(session, model)
        for number in numbers:
            end = turns[number - 1].tokens if 0 < number <= len(turns) else -1
            prefix = f"turns.{number}."
            fitted = _fitted({n: v for n, v in tensors.items() if n.startswith(prefix)}, prefix, model, end)
            session.states[number] = LMState.from_tensors(fitted, model.fingerprint(), prefix)
        return session


def _check_record(session: Session, model: Mamba3LM) -> None:
    ends = [(0, 0), *((turn.tokens, turn.characters) for turn in session.turns)]
    ascending = all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(ends))
    if not ascending or ends[-1] != (len(session.tokens), len(session.text)):
        raise ValueError("The turns of the session do not fit its tokens and its text; the file is not one of ours.")
    if any(not 0 <= token < model.config.vocab_size for token in session.tokens):
        raise ValueError(
            f"The session holds tokens outside [0, {model.config.vocab_size}): it is of another tokenizer."
        )


def _fitted(tensors: dict[str, Tensor], prefix: str, model: Mamba3LM, end: int) -> dict[str, Tensor]:
    """The tensors of a state in the model's dtypes and on its device, if they have the names and shapes of the model's and
    have read at most `end` tokens; all are finite."""
    template, count = model.init_state(1).tensors(prefix), tensors.get(f"{prefix}tokens", torch.empty(0))
    fits = template.keys() == tensors.keys() and count.shape == (1,) and 0 <= float(count) <= end
    for name, value in template.items() if fits else ():
        shape = list(value.shape)
        if name.endswith((".k", ".v")):  # a cache has a place for each token
            shape[1] = int(count)
        fits = fits and list(tensors[name].shape) == shape
        fits = fits and (not name.endswith(".length") or float(tensors[name]) == int(count))
    if not fits:
        raise ValueError("The states in the file do not fit this model or their session; it was made by another model.")
    fitted = {name: tensors[name].to(value.device, value.dtype) for name, value in template.items()}
    if not all(bool(value.isfinite().all()) for value in fitted.values()):
        raise ValueError("The states in the file must be finite numbers; some are infinite or NaN.")
    return fitted
