"""Around every request: an id, a bound on its body, a line in the log, a count. No prompt is ever logged."""

from __future__ import annotations

import json
import logging
import secrets
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mamba3.serve.errors import APIError, response_of
from mamba3.serve.service import Service

IMPORT_PATH = "/v1/sessions/import"
_log = logging.getLogger("mamba3.serve.access")


class JSONLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and what the record brings in `facts`."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        entry |= {"event": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class Observed:
    """ASGI middleware. Routes write what the log may say of them to request.state.facts."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, id, status = time.perf_counter(), f"req-{secrets.token_hex(8)}", 500
        scope.setdefault("state", {})["request_id"] = id
        limit = self.service.config.max_import if scope["path"] == IMPORT_PATH else self.service.config.max_body

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            told = dict(scope["headers"]).get(b"content-length", b"0")
            if told.isdigit() and int(told) > limit:
                await response_of(_too_large(limit))(scope, receive, noting_send)
            else:
                await self.app(scope, _bounded(receive, limit), noting_send)
        finally:
            self._note(scope, id, status, time.perf_counter() - began)

    def _note(self, scope: Scope, id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        facts = {"status": status, **scope["state"].get("facts", {})}
        self.service.metrics.requests.labels(route, str(facts["status"])).inc()
        facts = {"id": id, "method": scope["method"], "route": route, **facts, "seconds": round(seconds, 4)}
        _log.info("request", extra={"facts": facts})


def _too_large(limit: int) -> APIError:
    return APIError(413, f"The body of a request may have at most {limit} bytes.", code="body_too_large")


def _bounded(receive: Receive, limit: int) -> Receive:
    """A receive that stops a body that grows beyond the limit, whatever its header said."""
    got = 0

    async def bounded() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > limit:
            raise HTTPException(413, str(_too_large(limit)))
        return message

    return bounded
