"""A stand-in for the Hugging Face hub: an HTTP server on this machine that speaks as much of its API as a download needs.

`HF_ENDPOINT` points a process at it. What real users meet can be arranged: a gated repository, a private or missing one,
a bad token, a connection that breaks in the middle of a file.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """folders: what each repository holds. gated, forbidden: repositories answered with 401 or 403.

    breaks: how many times the connection is cut half way through a weights file. ranges: the Range headers that came.
    """

    daemon_threads = True

    def __init__(self, folders: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders, self.gated, self.forbidden = folders, set(), set()
        self.gated_status = 403  # to someone logged in; 401 to anyone else
        self.breaks, self.ranges, self.served = 0, [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def refuse(self, status, code, message):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body):
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/?]+)/?(\?.*)?", self.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repo = (api or file or [None, None])[1]
        if repo in self.server.forbidden:
            return self.refuse(403, "", "Forbidden: the token has no right to this")
        if repo not in self.server.folders:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if repo in self.server.gated and file:  # the real one lists a gated repository's files, but gives out none
            return self.refuse(self.server.gated_status, "GatedRepo", f"Access to model {repo} is restricted")
        folder = self.server.folders[repo]
        if api:
            return self.send_json(self.listing(repo, folder, api[2]))
        path = folder / file[3]
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.send_file(path, body)

    def listing(self, repo, folder, kind):
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
        if kind == "revision":
            return {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        return [
            {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": etag(folder / name)}
            for name in names
        ]

    def send_json(self, values):
        data = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, path, body):
        data, start = path.read_bytes(), 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted:
            self.server.ranges.append(self.headers["Range"])
            start = int(wanted[1])
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{etag(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        self.server.served.append(path.name)
        rest = data[start:]
        if self.server.breaks > 0 and len(rest) > 4096:
            self.server.breaks -= 1
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(rest)


def point_at(monkeypatch, server, cache):
    """This process, for the length of a test, asks the stand-in, keeps what it gets in `cache` and has no login."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    disable_progress_bars()
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
