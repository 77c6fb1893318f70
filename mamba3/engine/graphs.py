"""Decode steps as CUDA graphs: one launch in place of some two hundred, for a few batch sizes.

A graph of size m steps rows 0 .. m - 1 of the pool in place. Of these the first `live` hold sequences, a number that the graph
reads on the device: the others are padding, whose state is neither read nor written (`Mamba3LM.step`), so that a step
moves the bytes of the sequences there are. A hybrid's graphs read a number of pages of every row, a power of two. Graphs are
captured when they are first needed, or all by `capture`; their memory is one pool, for only one runs at a time.

A graph ends with the likeliest token of each row, which it leaves where the next step looks for its tokens: while the rows stay
what they are and these are the tokens chosen, nothing is sent to the device between two graphs. `fetch` brings them to the
host behind the graph, on the same stream.

Law: logits are those of the step without a graph, but for the rounding of products of m rows instead of n; tokens are those
that `sampler.sample` chooses from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mamba3.engine.channel import Channel
from mamba3.engine.config import EngineConfig
from mamba3.engine.pages import pages_of
from mamba3.engine.sampler import draw, likeliest
from mamba3.engine.state_pool import StatePool
from mamba3.lm import Mamba3LM
from mamba3.lm.generate import Sampling

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
        self._vocabulary = model.config.vocab_size
        self._numbers = torch.zeros(1 + pool.rows, dtype=torch.int64, device=device)  # how many are live, their tokens
        self._there: list[int] | None = None  # what they are, where that is known
        self._to, self._keys = Channel(1 + pool.rows, device), Channel(pool.rows, device)
        self._drawn = torch.zeros(pool.rows, dtype=torch.int64, device=device)
        self._back = Channel(pool.rows, device)
        self._memory: Any = None
        self._replays: dict[tuple[int, int], Replay] = {}  # by size, and pages of each row of a hybrid

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Let each of the first rows read its token: logits [n, padded vocabulary], good until the next step."""
        count = len(tokens)
        size = next(size for size in self._sizes if size >= count)
        replay, numbers = self._replay(size, pages_read(self._pool, 1)), [count, *tokens]
        if numbers != self._there:
            self._to.send(numbers, self._numbers)
        self._there = None
        return replay()[:count]

    def draw(self, logits: Tensor, filters: Sampling, keys: list[int]) -> None:
        """Tokens of the step that was launched last, drawn from its logits [n, v] where it left the likeliest ones."""
        self._keys.send(keys, self._drawn)
        self._numbers[1 : 1 + len(keys)].copy_(draw(logits, filters, self._drawn[: len(keys)]))

    def fetch(self, count: int) -> Callable[[], list[int]]:
        """Bring the tokens of the first rows to the host: what waits for them, before another step is launched."""
        arrived = self._back.fetch(self._numbers[1 : 1 + count])

        def tokens() -> list[int]:
            found = arrived()
            self._there = [count, *found]
            return found

        return tokens

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

    @torch.no_grad()
    def _capture(self, size: int, width: int) -> Replay:
        def step() -> Tensor:
            state, tokens = self._pool.view(size, width=width), self._numbers[1 : 1 + size]
            logits = self._model.step(tokens, state, self._numbers[:1])[0]
            tokens.copy_(likeliest(logits[:, : self._vocabulary]))
            return logits

        self._there = None
        self._to.send([0], self._numbers)  # the step that warms up moves no row
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
