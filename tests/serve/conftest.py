"""A server on a port of this machine, with a tiny model, for the official client."""

import importlib.util
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mamba3.train.tokenizer import byte_tokenizer
from tests.lm.test_model import tiny
from tests.train.conftest import one_thread

if not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "openai", "prometheus_client", "jinja2"))):
    collect_ignore_glob = ["test_*.py"]

__all__ = ["one_thread"]


def lm():
    """Untrained, and yet it does not merely repeat a byte. It ends no text unless a bias asks it to."""
    model = tiny(vocab_size=257, tie_embeddings=False, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[256] = 0  # where only the weights are saved, it seldom does

    def unending(_, inputs, logits):
        return logits.index_fill(-1, torch.tensor([256]), -20.0)

    model.lm_head.register_forward_hook(unending)
    return model


class Server:
    """A running server. url: where."""

    def __init__(self, service, app, port):
        self.service, self.app, self.url = service, app, f"http://127.0.0.1:{port}"
        self.clients = {}

    def client(self, key="none"):
        import openai

        if key not in self.clients:
            self.clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)
        return self.clients[key]

    def call(self, method, path, body=None, key=None, data=None, timeout=60):
        """(status, headers, JSON or bytes) without the client."""
        import urllib.error
        import urllib.request

        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        data = data if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                status, found, raw = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, found, raw = error.code, error.headers, error.read()
        return status, found, json.loads(raw) if "json" in found.get("Content-Type", "") else raw

    def idle(self, seconds=60.0):
        """Wait until nothing is under way; whether that came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.service.engine.busy and not self.service._under_way:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def served(**parts) -> Iterator[Server]:
    """A server of `lm()`; parts: of the Service."""
    import uvicorn

    from mamba3.serve import PLAIN, PLAIN_STOPS, ChatTemplate, Service, create_app

    tokenizer = parts.pop("tokenizer", None) or byte_tokenizer()
    template = parts.pop("template", None) or ChatTemplate(PLAIN, tokenizer, stops=PLAIN_STOPS)
    service = Service(parts.pop("model", None) or lm(), tokenizer, template, **parts)
    app = create_app(service)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 30
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        assert server.started
        running = Server(service, app, port)
        yield running
        for client in running.clients.values():
            client.close()
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    from mamba3.engine import EngineConfig, SessionStore

    torch.set_num_threads(1)
    model = lm()
    store = SessionStore(model, tmp_path_factory.mktemp("sessions"))
    with served(model=model, engine=EngineConfig(rows=4), sessions=store) as running:
        yield running
