"""Serving until told to stop: SIGTERM ends it without ending what is under way."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from mamba3.serve.app import create_app
from mamba3.serve.middleware import JSONLines
from mamba3.serve.service import Service


class _Server(uvicorn.Server):
    """uvicorn's server, which tells the service when it is asked to stop."""

    service: Service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, Ctrl-C again stops at once. uvicorn's own ends the process by the signal, not with 0."""
        self.service.draining = True  # from here on new requests are refused, also on connections that stay open
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(
            f"a server needs an address that it can listen on, but {host} at port {port} is none ({error}); give others with "
            "--host and --port."
        ) from error


def serve(service: Service, host: str, port: int, drain_seconds: int) -> None:
    """Serve until SIGTERM or Ctrl-C. Requests under way then have `drain_seconds` to end; sessions are parked after that.

    Raises ValueError when the address cannot be listened on.
    """
    listening = _listen(host, port)
    logger = logging.getLogger("mamba3.serve")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    settings = uvicorn.Config(
        create_app(service), host=host, port=port, access_log=False, log_level="warning",
        timeout_graceful_shutdown=drain_seconds,
    )  # fmt: skip
    server = _Server(settings)
    server.service = service
    engine = service.engine
    facts = {"host": host, "port": port, "model": service.config.model_name, "rows": engine.config.rows}
    facts["graphs"] = "yes" if engine.why_no_graphs is None else f"none: {engine.why_no_graphs}"
    logger.info("serving", extra={"facts": {**facts, "pool_bytes": engine.pool.nbytes}})
    # Looking through the 400,000 objects of the libraries stops everything for 0.2 to 0.6 s now and then: they stay anyway.
    gc.collect()
    gc.freeze()
    try:
        server.run([listening])
    finally:
        listening.close()
        gc.unfreeze()
        logger.info("stopped", extra={"facts": {"sessions": len(service.sessions)}})
        logger.removeHandler(handler)
