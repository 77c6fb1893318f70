"""Text that goes on: a model's state with what the next token needs besides it, in memory or in one file.

A state has read every token but the last one chosen. The file therefore holds, beside the state, that token, the tokens
seen (for the repetition penalty) and the random generator. Law: stopping anywhere, saving, and going on from the file with
the same settings gives the tokens of never having stopped. `LMState.load` reads the file too, without these extras.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mamba3.lm import LMState, Mamba3LM
from mamba3.lm.generate import Sampling, choose, penalize
from mamba3.ops import state_file

_OWN = ("format", "version", "kind", "checksum")  # metadata that the writer sets itself
_PREFILL = 1024  # prompt tokens read at a time, which bounds memory


@dataclass
class Session:
    """One sequence: `unread` tokens come next, `seen` were read or chosen, `generator` draws.

    `context`: the last tokens of the shown text, if a character is incomplete (`TextStream.context`).
    """

    model: Mamba3LM
    state: LMState
    generator: torch.Generator
    unread: list[int] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    context: list[int] = field(default_factory=list)

    @classmethod
    def new(cls, model: Mamba3LM) -> "Session":
        return cls(model, model.init_state(1), _generator(model))

    @classmethod
    def load(cls, path: Path, model: Mamba3LM) -> "Session":
        """Raises ValueError when the file is missing, damaged, of another model or of several sequences."""
        if not path.is_file():
            raise ValueError(f"a state to go on from must be a file, but {path} is none; save one with --state-out.")
        state = LMState.load(path, model)
        if state.batch_size != 1:
            raise ValueError(f"a session is one sequence, but {path} holds the state of {state.batch_size}.")
        tensors, _ = state_file.read(path, kind="model")
        session = cls(model, state, _generator(model))
        if "session.generator" in tensors:
            session.generator.set_state(tensors["session.generator"])
            session.unread = tensors["session.unread"].tolist()
            session.seen = set(tensors["session.seen"].tolist())
            session.context = tensors["session.context"].tolist()
        return session

    def save(self, path: Path) -> None:
        """Write state and extras, atomically. Raises OSError, with the file that was there untouched."""
        with tempfile.TemporaryDirectory() as scratch:
            self.state.save(Path(scratch) / "state", self.model)
            tensors, metadata = state_file.read(Path(scratch) / "state", kind="model")
        tensors |= {
            "session.unread": torch.tensor(self.unread, dtype=torch.int64),
            "session.seen": torch.tensor(sorted(self.seen), dtype=torch.int64),
            "session.context": torch.tensor(self.context, dtype=torch.int64),
            "session.generator": self.generator.get_state(),
        }
        extra = {name: value for name, value in metadata.items() if name not in _OWN}
        state_file.write(path, tensors, kind="model", **extra)

    def add(self, tokens: list[int]) -> None:
        """What is to be read next, after what was left unread."""
        self.unread += tokens
        self.seen.update(tokens)

    @torch.no_grad()
    def tokens(self, sampling: Sampling, limit: int) -> Iterator[int]:
        """Choose up to `limit` tokens, each given out as it is chosen. The session is valid after every one of them.

        Raises ValueError if nothing is left to read.
        """
        if not self.unread:
            raise ValueError("a model continues at least one token, but nothing came; give a prompt or a saved state.")
        for _ in range(limit):
            logits = self._read()[:, : self.model.config.vocab_size]
            if sampling.repetition_penalty != 1:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                seen[:, sorted(self.seen)] = True
                logits = penalize(logits, seen, sampling.repetition_penalty)
            token = int(choose(logits, sampling, self.generator))
            self.add([token])
            yield token

    def _read(self) -> torch.Tensor:
        """Read what is unread: logits [1, v] after its last token."""
        ids = torch.tensor([self.unread], device=self.model.embedding.weight.device)
        if ids.shape[1] == 1 and int(self.state.tokens) > 0:
            logits, self.state = self.model.step(ids[0], self.state)
        else:
            logits = torch.empty(0)
            for piece in ids.split(_PREFILL, dim=1):
                logits, self.state = self.model.prefill(piece, self.state, last_only=True)
            logits = logits[:, -1]
        self.unread = []
        return logits


def _generator(model: Mamba3LM) -> torch.Generator:
    generator = torch.Generator(model.embedding.weight.device)
    generator.seed()
    return generator
