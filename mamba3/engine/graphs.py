"""Decode steps as CUDA graphs: one launch in place of some two hundred, for a few batch sizes.

A graph of size m steps rows 0 .. m - 1 of the pool in place. Of these the first `live` hold sequences, a number that the graph
reads on the device: the others are padding, whose state is neither read nor written (`Mamba3LM.step`), so that a step
moves the bytes of the sequences there are. A hybrid's graphs read a number of pages of every row, a power of two. Graphs are
captured when they are first needed, or all by `capture`; their memory is one pool, for only one runs at a time.

Law: logits are those of the step without a graph, but for the rounding of products of m rows instead of n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mamba3.engine.config import EngineConfig
from mamba3.engine.pages import pages_of
from mamba3.engine.state_pool import StatePool
from mamba3.lm import Mamba3LM

Replay = Callable[[], Tensor]
SHORTEST = 16  # pages


class CaptureFailed(RuntimeError):
    """A step is no graph on this device; no row was moved."""


def sizes(rows: int) -> list[int]:
    """Batch sizes up to `rows`: 1, 2, 4, 8, 12, 16, 24, 32, 48, ...: at most a half more rows than there are sequences."""
    found = {rows} | {
        size for n in range(rows.bit_length()) for size in (2**n, 3 * 2 ** (n - 1)) if n > 2 or size == 2**n
    }
    return sorted(size for size in found if size <= rows)


def why_not(model: Mamba3LM, config: EngineConfig) -> str | None:
    """Why decode steps cannot be graphs; None where they should: whether a model's step can be captured is seen when it is."""
    device = model.embedding.weight.device.type
    if not config.graphs:
        return "the engine was told to do without (graphs=False)"
    if device != "cuda":
        return f"CUDA graphs need a CUDA device, and the model is on {device}"
    if config.exact:
        return "exact=True steps each sequence by itself, at whatever row it is"
    return None


def pages_read(pool: StatePool, tokens: int) -> int:
    """Pages of each row of a hybrid that a graph for so many tokens reads: a power of two that the longest row fits, so that
    there are few; 0 without pages."""
    if pool.pages is None:
        return 0
    pages = max(SHORTEST, pages_of(pool.longest + tokens))
    return min(1 << (pages - 1).bit_length(), pages_of(pool.max_length))


class DecodeGraphs:
    """The graphs of one model over one pool."""

    def __init__(self, model: Mamba3LM, pool: StatePool):
        self._model, self._pool, self._sizes = model, pool, sizes(pool.rows)
        device = model.embedding.weight.device
        self._numbers = torch.zeros(1 + pool.rows, dtype=torch.int64, device=device)  # how many are live, their tokens
        self._sent = torch.zeros(1 + pool.rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._memory: Any = None
        self._replays: dict[tuple[int, int], Replay] = {}  # by size, and pages of each row of a hybrid

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Let each of the first rows read its token: logits [n, padded vocabulary], good until the next step."""
        count = len(tokens)
        size = next(size for size in self._sizes if size >= count)
        replay = self._replay(size, pages_read(self._pool, 1))
        self._send([count, *tokens])
        return replay()[:count]

    def capture(self) -> Iterator[tuple[int, int]]:
        """Capture what is not captured yet, the largest first, whose memory the others share: (how many there are, of how
        many). Of a hybrid, those of its shortest tables."""
        for done, size in enumerate(reversed(self._sizes), 1):
            self._replay(size, pages_read(self._pool, 1))
            yield done, len(self._sizes)

    def _replay(self, size: int, width: int) -> Replay:
        if (size, width) not in self._replays:
            self._replays[size, width] = self._capture(size, width)
        return self._replays[size, width]

    def _send(self, numbers: list[int]) -> None:
        """One copy to the device. The one before has arrived: the host has waited for its step's tokens, or for a capture."""
        self._sent[: len(numbers)] = torch.tensor(numbers)
        self._numbers[: len(numbers)].copy_(self._sent[: len(numbers)], non_blocking=True)

    @torch.no_grad()
    def _capture(self, size: int, width: int) -> Replay:
        def step() -> Tensor:
            state = self._pool.view(size, width=width)
            return self._model.step(self._numbers[1 : 1 + size], state, self._numbers[:1])[0]

        self._send([0])  # the step that warms up moves no row
        try:
            replay, memory = record(step, self._memory)
        except RuntimeError as error:
            raise CaptureFailed(f"the step of {size} rows could not be captured ({error})") from error
        self._memory = self._memory or memory
        return replay


def record(run: Callable[[], Tensor], memory: Any) -> tuple[Replay, Any]:
    """`run` as a CUDA graph, after one run that compiles and allocates what it needs, and the graph's memory, for the next.

    What it returns is overwritten by the next replay of any graph of the same memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may copy and allocate meanwhile: that is no error of this one.
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay, graph.pool()
