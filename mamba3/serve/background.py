"""The engine in a thread of its own, for callers in an event loop.

Requests and aborts go in through a queue that is emptied between two steps; a step's outputs come back in one call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future

from mamba3.engine import Engine, Output, Request

_log = logging.getLogger("mamba3.serve")
_IDLE_SECONDS = 0.5  # how long the thread sleeps at most without being woken
Mail = asyncio.Queue[Output | Exception]


class EngineFailed(RuntimeError):
    """The engine could not go on; the requests it had are lost."""


class EngineThread:
    """One engine, one thread. `stream` may be called from one event loop."""

    def __init__(self, engine: Engine, on_step: Callable[[float, int], None] = lambda seconds, tokens: None):
        self.engine, self._on_step = engine, on_step
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._mail: dict[str, tuple[asyncio.AbstractEventLoop, Mail]] = {}
        self._stopping = threading.Event()
        self._closed, self._taking = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; requests under way end with EngineFailed."""
        self._stopping.set()
        self._commands.put(lambda: None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    async def stream(self, request: Request) -> AsyncGenerator[Output, None]:
        """The request's outputs as they come. Leaving early aborts it. Raises what `Engine.add` raises, and EngineFailed."""
        loop, mail, left = asyncio.get_running_loop(), Mail(), request.params.n
        added: Future[None] = Future()
        self._mail[request.id] = (loop, mail)
        try:
            with self._taking:
                if self._closed:
                    raise self._ended()
                self._commands.put(lambda: self._add(request, added))
            await asyncio.wrap_future(added)
            while left:
                output = await mail.get()
                if isinstance(output, Exception):
                    raise output
                left -= output.finish is not None
                yield output
        finally:
            del self._mail[request.id]
            if left:
                self._commands.put(lambda: self._drop(request.id))

    def _add(self, request: Request, added: Future[None]) -> None:
        if not added.set_running_or_notify_cancel():
            return  # whoever asked has gone
        try:
            if self._closed:
                raise self._ended()
            self.engine.add(request)
        except Exception as error:  # noqa: BLE001 (it is the caller's)
            added.set_exception(error)
        else:
            added.set_result(None)

    def _drop(self, request_id: str) -> None:
        if not self._closed:
            self.engine.abort(request_id)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:  # noqa: BLE001 (whatever it was, those who wait must be told)
            _log.exception("the engine's thread died; nothing is served any more")
        finally:
            self._close()

    def _close(self) -> None:
        """Nothing is taken any more, and whoever waits is told."""
        with self._taking:  # what was asked before is in the queue, what comes after is refused
            self._closed = True
        while not self._commands.empty():
            self._commands.get()()
        self._fail(self._ended())

    def _ended(self) -> EngineFailed:
        stopped = self._stopping.is_set()
        return EngineFailed("The server is shutting down." if stopped else "The engine has died; its log says why.")

    def _serve(self) -> None:
        while not self._stopping.is_set():
            self._obey()
            if not self.engine.busy:
                continue
            began = time.perf_counter()
            try:
                outputs = self.engine.step()
            except Exception:  # noqa: BLE001 (whatever it was, others wait to be served)
                _log.exception("a step of the engine failed; its requests are lost")
                self.engine.reset()
                self._fail(EngineFailed("The engine failed; its log says why."))
                continue
            self._on_step(time.perf_counter() - began, sum(output.token is not None for output in outputs))
            self._deliver(outputs)

    def _obey(self) -> None:
        """Carry out what was asked; without work, wait for it."""
        try:
            command = self._commands.get(block=not self.engine.busy, timeout=_IDLE_SECONDS)
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _deliver(self, outputs: list[Output]) -> None:
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Mail, Output]]] = {}
        for output in outputs:
            place = self._mail.get(output.request_id)
            if place is not None:
                batches.setdefault(place[0], []).append((place[1], output))
        for loop, batch in batches.items():
            _post(loop, batch)

    def _fail(self, error: Exception) -> None:
        for loop, mail in list(self._mail.values()):
            _post(loop, [(mail, error)])


def _post(loop: asyncio.AbstractEventLoop, batch: list) -> None:
    def put() -> None:
        for mail, item in batch:
            mail.put_nowait(item)

    if not loop.is_closed():
        loop.call_soon_threadsafe(put)
