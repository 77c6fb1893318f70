"""What an engine may use: rows, queue, tokens a step, bytes of cache. Frozen, checked when made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of an engine. A row holds the state of one sequence that is being continued.

    exact: every sequence is read and stepped by itself, in pieces of `prefill_chunk` counted from its beginning, with the
    calls that `Mamba3LM.generate(prefill_chunk=...)` makes: results are bitwise the same whatever else is in the batch.
    Otherwise sequences share matrix products, whose rounding depends on how many there are; two tokens whose logits are
    closer than that rounding may then change places.
    """

    rows: int = 16  # sequences continued at a time; their states are allocated once
    queue: int = 256  # requests of one owner that may wait; one more raises QueueFull
    prefill_chunk: int = 512  # prompt tokens of a sequence read at a time
    step_tokens: int = 1024  # tokens read in a step, prompts and continuations together: bounds the time between tokens
    prompts: int = 4  # prompts read side by side, in turns
    quantum: int | None = None  # tokens after which a sequence makes way for one that waits; None: it keeps its row
    max_length: int = 65_536  # tokens of one sequence of a hybrid, prompt included: what its caches may grow to
    attention_bytes: int = 2**30  # of the pages that hold a hybrid's caches, of all rows and snapshots together
    cache_bytes: int = 256 * 2**20  # of snapshots in the prefix cache; 0: none
    cache_grid: int = 1024  # a snapshot is taken every so many tokens of a prompt
    speculate: int = 0  # tokens that a draft proposes at a time; 0: no speculation
    state_dtype: str | None = None  # of the matrix states in rows: "float16" or "bfloat16" halve them; None: float32
    graphs: bool = True  # steps of running sequences as CUDA graphs, where they can be had
    exact: bool = False

    def __post_init__(self):
        for name in ("rows", "queue", "prefill_chunk", "step_tokens", "prompts", "max_length", "cache_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; it is {getattr(self, name)}.")
        for name in ("attention_bytes", "cache_bytes", "speculate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; it is {getattr(self, name)}.")
        if self.quantum is not None and self.quantum < 1:
            raise ValueError(f"quantum must be at least 1, or None; it is {self.quantum}.")
        if self.exact and self.cache_grid % self.prefill_chunk:
            raise ValueError(
                f"With exact=True cache_grid must be a multiple of prefill_chunk = {self.prefill_chunk}, so that a snapshot "
                f"lies where a piece ends; it is {self.cache_grid}."
            )
        if self.state_dtype not in (None, "float16", "bfloat16"):
            raise ValueError(f'state_dtype must be "float16", "bfloat16" or None; it is {self.state_dtype!r}.')
        if self.state_dtype and (self.exact or self.speculate):
            raise ValueError(
                "state_dtype rounds states, which exact=True excludes and speculation does not read; set one of them."
            )
        if self.exact and self.speculate:
            raise ValueError("exact=True excludes speculation, which reads several tokens at once; set one of them.")
