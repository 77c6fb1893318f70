"""What the routes share: the engine, the sessions, the tokenizer and its template, who may do what."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenizers import Tokenizer

from mamba3.engine import Engine, EngineConfig, Proposer, Session, SessionStore
from mamba3.lm import Mamba3LM
from mamba3.serve.background import EngineThread
from mamba3.serve.chat_template import ChatTemplate
from mamba3.serve.errors import APIError
from mamba3.serve.metrics import Metrics
from mamba3.text.encode import byte_pieces, end_of_text

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What a server allows."""

    model_name: str = "mamba3"
    api_keys: tuple[str, ...] = ()  # none: no key is asked for
    max_tokens: int = 4096  # of one continuation
    max_prompt: int = 1_000_000  # tokens of one prompt
    max_body: int = 8 * 2**20  # bytes of one request
    max_import: int = 2**30  # bytes of a session that is brought in
    per_key: int = 64  # requests of one key at a time


class Service:
    """One model, served."""

    def __init__(
        self,
        model: Mamba3LM,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        config: ServeConfig | None = None,
        engine: EngineConfig | None = None,
        sessions: SessionStore | None = None,
        draft: Proposer | None = None,
    ):
        self.tokenizer, self.template, self.config = tokenizer, template, config or ServeConfig()
        self.end_token, self.pieces = end_of_text(tokenizer), byte_pieces(tokenizer)
        owners = max(1, len(self.config.api_keys))
        self.sessions = SessionStore(model, owners=owners) if sessions is None else sessions
        self.metrics, self.draining = Metrics(), False
        self.engine = Engine(model, engine, tokenizer, self.end_token, draft)
        self.thread = EngineThread(self.engine, self.metrics.stepped)
        self._owners = {_hash(key): _hash(key) for key in self.config.api_keys}
        self._under_way: Counter[str] = Counter()
        self.tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._leaving: set[asyncio.Future[None]] = set()  # the event loop itself holds its tasks weakly
        self._add_gauges()

    # -- who asks

    def owner(self, authorization: str | None) -> str:
        """Whose request it is, from its Authorization header. 401 without a right key, 503 while the server ends."""
        if self.draining:
            raise APIError(503, "The server is shutting down; try another one, or again later.", code="draining")
        if not self._owners:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        owner = self._owners.get(_hash(key.strip()))
        if scheme.lower() != "bearer" or owner is None:
            raise APIError(401, "A right API key is needed: Authorization: Bearer KEY.", code="invalid_api_key")
        return owner

    @asynccontextmanager
    async def place(self, owner: str) -> AsyncIterator[None]:
        """One of the requests that an owner may have under way; 429 when there are too many."""
        if self._under_way[owner] >= self.config.per_key:
            told = f"{self.config.per_key} requests of this key are under way, and no more are let in."
            raise APIError(429, told, code="too_many_requests")
        self._under_way[owner] += 1
        try:
            yield
        finally:
            self._under_way[owner] -= 1
            if not self._under_way[owner]:
                del self._under_way[owner]

    def check_model(self, name: str) -> None:
        """404 for the name of a model that is not served."""
        if name != self.config.model_name:
            told = f"There is no model {name!r} here; there is {self.config.model_name!r}."
            raise APIError(404, told, param="model", code="model_not_found")

    def max_tokens(self, wanted: int | None, default: int) -> int:
        """How many tokens may be chosen; 400 when more are asked for than are allowed."""
        if wanted is not None and wanted > self.config.max_tokens:
            raise APIError(
                400, f"max_tokens may be at most {self.config.max_tokens}; it is {wanted}.", param="max_tokens"
            )
        return min(default, self.config.max_tokens) if wanted is None else wanted

    async def tokenize(self, call: Callable[..., T], *arguments: Any) -> T:
        """A call of the tokenizer beside the event loop, always in the same thread: each thread that encodes comes to hold a
        cache of 10,000 words, and what is kept once is kept for good."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, call, *arguments)

    # -- sessions

    @asynccontextmanager
    async def session(self, owner: str, name: str) -> AsyncIterator[Session]:
        """A session for one request, which takes place whole or not at all; its file is read and written beside the event
        loop, and the session is in use until that is done, whatever happens to the request."""
        self.sessions.check_memory(owner)
        taking = asyncio.ensure_future(asyncio.to_thread(self.sessions.take, owner, name))
        end = self.sessions.roll_back
        try:
            lease = await asyncio.shield(taking)
            yield lease.session
            end = self.sessions.commit
        finally:  # in a task of its own: a client that goes away cancels what waits here

            async def leave() -> None:
                await asyncio.wait([taking])
                if taking.exception() is None:
                    await asyncio.to_thread(end, taking.result())

            leaving = asyncio.ensure_future(leave())
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await asyncio.shield(leaving)

    def _add_gauges(self) -> None:
        gauge, engine = self.metrics.gauge, self.engine
        gauge("running", "Sequences that have a row", lambda: len(engine.scheduler.running))
        gauge("reading", "Prompts being read", lambda: len(engine.scheduler.prompts))
        gauge("waiting", "Requests in the queue", lambda: engine.scheduler.waiting)
        gauge("rows", "Rows of the state pool", lambda: engine.config.rows)
        gauge("pool_bytes", "Bytes of the state pool", lambda: engine.pool.nbytes)
        gauge("pages", "Pages of a hybrid's caches", lambda: engine.pool.pages.count if engine.pool.pages else 0)
        gauge("pages_free", "Pages that nobody holds", lambda: engine.pool.pages.free if engine.pool.pages else 0)
        gauge("swaps", "Sequences whose caches left the pages for others, so far", lambda: engine.counters.swaps)
        gauge("preemptions", "Sequences that made way for others, so far", lambda: engine.counters.preemptions)
        gauge("guessed_tokens", "Tokens that a draft guessed, so far", lambda: engine.counters.guessed_tokens)
        gauge("right_guesses", "Guesses that were right, so far", lambda: engine.counters.right_guesses)
        gauge("cache_bytes", "Bytes of the prefix cache", lambda: engine.cache.nbytes)
        gauge("cache_snapshots", "Snapshots in the prefix cache", lambda: len(engine.cache))
        gauge("cache_hits", "Prompts that began with a snapshot, so far", lambda: engine.cache.hits)
        gauge("cache_misses", "Prompts that did not, so far", lambda: engine.cache.misses)
        gauge("sessions", "Sessions, parked ones included", lambda: len(self.sessions))
        gauge("sessions_resident", "Sessions in memory", lambda: self.sessions.resident)
        gauge("session_bytes", "Bytes of sessions in memory", lambda: self.sessions.nbytes)
        gauge("tokens_per_second", "Tokens chosen a second, over ten seconds", lambda: self.metrics.tokens_per_second)


def _hash(key: str) -> str:
    """What is kept of a key. Looking hashes up takes no time that tells of the key."""
    return hashlib.sha256(key.encode()).hexdigest()
