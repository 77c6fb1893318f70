"""Prometheus metrics of one server: counters as things happen, gauges read when they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WINDOW = 10.0  # seconds over which tokens per second are averaged


class Metrics:
    """What GET /metrics shows."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"mamba3_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"mamba3_{name}", text, buckets=_SECONDS, registry=self.registry)

        self.requests = counter("requests", "HTTP requests answered", ("route", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, those that were not read again included")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts that a snapshot or a session spared reading")
        self.completion_tokens = counter("completion_tokens", "Tokens chosen")
        self.aborted = counter("aborted", "Requests whose client went away")
        self.first_token = histogram("first_token_seconds", "From a request's arrival to its first token")
        self.between_tokens = histogram("between_tokens_seconds", "Between two tokens of one continuation")
        self.step = histogram("step_seconds", "One step of the engine")
        self._steps: deque[tuple[float, int]] = deque()

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(f"mamba3_{name}", text, registry=self.registry).set_function(read)

    def stepped(self, seconds: float, tokens: int) -> None:
        """The engine made a step. Called in its thread."""
        self.step.observe(seconds)
        self._steps.append((monotonic(), tokens))
        while self._steps and self._steps[0][0] < monotonic() - _WINDOW:
            self._steps.popleft()

    @property
    def tokens_per_second(self) -> float:
        """Tokens chosen in the last ten seconds."""
        since = monotonic() - _WINDOW
        return sum(tokens for at, tokens in list(self._steps) if at >= since) / _WINDOW

    def text(self) -> Iterator[bytes]:
        """The exposition format."""
        yield generate_latest(self.registry)
