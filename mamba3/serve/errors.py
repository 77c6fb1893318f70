"""Every error in the one shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mamba3.engine import (
    QueueFull,
    SessionBusy,
    SessionMemoryFull,
    SessionNotSaved,
    TooManySessions,
    UnknownSession,
)
from mamba3.serve.background import EngineFailed

_log = logging.getLogger("mamba3.serve")
RETRY_SECONDS = 1
_TYPES = {
    401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "server_error", 503: "server_error",
}  # fmt: skip


class ErrorBody(BaseModel):
    """What went wrong, for people; param: which field; code: for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorBody


class APIError(Exception):
    """An answer that is no success, raised anywhere in a request."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@contextmanager
def of_the_caller(param: str | None = None) -> Iterator[None]:
    """A ValueError in the block is about what the caller sent: 400. Anywhere else it is our own fault: 500."""
    try:
        yield
    except ValueError as error:
        raise APIError(400, str(error), param=param) from error


def error_of(error: Exception) -> APIError:
    """What a caller is told of an exception; of those that are our own fault nothing but that."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, QueueFull):
        return APIError(429, str(error), code="queue_full")
    if isinstance(error, UnknownSession):
        return APIError(404, str(error.args[0]), param="session", code="session_not_found")
    if isinstance(error, SessionBusy):
        return APIError(409, str(error), param="session", code="session_busy")
    if isinstance(error, TooManySessions):
        return APIError(429, str(error), code="too_many_sessions")
    if isinstance(error, SessionMemoryFull):
        return APIError(429, str(error), param="session", code="session_memory_full")
    if isinstance(error, SessionNotSaved):
        return APIError(503, str(error), param="session", code="session_not_saved")
    if isinstance(error, EngineFailed):
        return APIError(503, str(error), code="engine_failed")
    return APIError(500, "The server failed; its log says why.", code="internal_error")


def body_of(error: APIError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    body = ErrorBody(message=str(error), type=kind, param=error.param, code=error.code)
    return ErrorResponse(error=body).model_dump()


def response_of(error: APIError) -> JSONResponse:
    """The whole answer."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error), error.status, headers)


def install(app: FastAPI) -> None:
    """Let every exception of the app end in that shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        param = ".".join(path) or None
        if first["type"] == "extra_forbidden":
            told = APIError(400, f"{param} is not supported by this server.", param=param, code="unsupported_parameter")
        else:
            told = APIError(400, f"{param or 'The body'}: {first['msg']}.", param=param, code="invalid_value")
        return response_of(told)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        response = response_of(APIError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    async def known(request: Request, error: Exception) -> JSONResponse:
        return response_of(error_of(error))

    for kind in (
        APIError, QueueFull, UnknownSession, SessionBusy, TooManySessions, SessionMemoryFull, SessionNotSaved, EngineFailed,
    ):  # fmt: skip
        app.exception_handler(kind)(known)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        _log.error("request failed", exc_info=error)
        return response_of(error_of(error))
