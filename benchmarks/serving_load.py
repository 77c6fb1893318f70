"""A server in a process of its own, under many streams of the official client, and under requests that make no sense."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import linear_regression
from typing import Any

import openai

from benchmarks.checks import Refused
from benchmarks.results import Tell
from benchmarks.timer import percentiles

_WARM_UP_SHARE = 0.2  # of the time, before memory counts as settled
_TRACE = 60  # samples of memory that a result keeps


@contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """(url, process) of `mamba3 serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mamba3", "serve", "--model", str(model), "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while not _well(url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise Refused(f"the server did not start: {log.read()[-300:]}")
                time.sleep(0.2)
            yield url, process
        finally:
            process.terminate()
            process.wait(60)


def _well(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def streams(model: Path, count: int, seconds: float, device: str, tell: Tell) -> dict[str, Any]:
    """Streams that begin anew as soon as they end: latencies, errors, and the memory of the server."""
    options = [
        "--rows", str(count), "--queue", str(2 * count), "--per-key", str(2 * count), "--device", device,
        "--cache-mib", "32",  # which is full before memory counts
    ]  # fmt: skip
    with server(model, *options) as (url, process):
        return asyncio.run(_drive(url, process.pid, count, seconds, tell))


async def _drive(url: str, pid: int, count: int, seconds: float, tell: Tell) -> dict[str, Any]:
    first, between, errors, tokens, memory = [], [], [], [0], []
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    name, began = (await client.models.list()).data[0].id, time.monotonic()
    turns = itertools.count()

    async def one() -> None:
        while time.monotonic() < began + seconds:
            chance = random.Random(next(turns))
            prompt = "".join(chance.choices("abcdefgh \n", k=chance.randint(8, 512)))
            asked, last = time.perf_counter(), None
            try:
                stream = await client.completions.create(
                    model=name, prompt=prompt, max_tokens=chance.randint(16, 128), stream=True, seed=chance.randint(0, 9),
                    stream_options={"include_usage": True},
                )  # fmt: skip
                async for chunk in stream:
                    now = time.perf_counter()
                    tokens[0] += chunk.usage.completion_tokens if chunk.usage else 0
                    if chunk.choices and last is None:
                        first.append(now - asked)
                    elif chunk.choices and last is not None:
                        between.append(now - last)
                    last = now
            except openai.OpenAIError as error:
                errors.append(type(error).__name__)

    async def watch() -> None:
        while time.monotonic() < began + seconds:
            memory.append((time.monotonic() - began, len(first), resident_bytes(pid) / 2**20))
            tell(f"{time.monotonic() - began:.0f} s, {len(first)} streams begun, {len(errors)} errors")
            await asyncio.sleep(min(1.0, seconds / 20))

    await asyncio.gather(watch(), *(one() for _ in range(count)))
    await client.close()
    return {
        "streams": count, "seconds": seconds, "requests": len(first),
        "errors": len(errors), "kinds_of_errors": sorted(set(errors)),
        "tokens_per_s": tokens[0] / (time.monotonic() - began), "first_token_s": percentiles(first),
        "between_tokens_s": percentiles(between), "resident_mib": growth(memory, _WARM_UP_SHARE * seconds),
    }  # fmt: skip


def growth(memory: list[tuple[float, int, float]], warm: float) -> dict[str, Any]:
    """Of samples (second, requests begun, MiB) those after the warm-up: first, last, most, the slope of a straight line
    through them, and some of them as [second, MiB]."""
    settled = [sample for sample in memory if sample[0] >= warm] or memory[-1:]
    held = [mib for _, _, mib in settled]
    slope = {"a_minute": 60 * _slope([at for at, _, _ in settled], held)}
    slope["a_thousand_requests"] = 1000 * _slope([float(begun) for _, begun, _ in settled], held)
    trace = [[at, mib] for at, _, mib in memory[:: max(1, len(memory) // _TRACE)]]
    return {"settled": held[0], "end": held[-1], "most": max(held), "slope": slope, "trace": trace}


def _slope(x: list[float], y: list[float]) -> float:
    """Of the straight line that fits best; 0 where x does not change."""
    return linear_regression(x, y).slope if len(set(x)) > 1 else 0.0


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


HOOKS = """
import schemathesis

@schemathesis.hook
def map_body(context, body):
    # A right model's name lets requests get past the first check.
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = "small"
    return body
"""


def malformed(model: Path, requests: int, tell: Tell) -> dict[str, Any]:
    """Requests drawn from the OpenAPI schema (schemathesis), at least so many that break it and then some that do not: an
    answer that is a server's error, or has a status or a shape that the schema does not name, refuses the section."""
    program = Path(sys.executable).with_name("schemathesis")
    if shutil.which(program) is None:
        raise Refused("schemathesis is missing; pip install schemathesis")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hooks.py").write_text(HOOKS)
        options = ["--name", "small", "--max-tokens", "8", "--sessions", f"{folder}/sessions", "--rows", "4"]
        with server(model, *options) as (url, _):
            tell("requests that break the schema")
            wrong = _draw(program, url, folder, "negative", requests)
            tell("requests that keep to it")
            right = _draw(program, url, folder, "positive", requests)
    if wrong < requests:
        raise Refused(f"schemathesis made {wrong} requests that break the schema, and {requests} were asked for")
    return {"malformed": wrong, "well_formed": right, "server_errors": 0, "failed_checks": 0}


def _draw(program: Path, url: str, folder: str, mode: str, requests: int) -> int:
    """How many requests of a kind were made; all had right answers."""
    command = [
        str(program), "run", f"{url}/openapi.json", "--mode", mode, "--checks",
        "not_a_server_error,status_code_conformance,response_schema_conformance,content_type_conformance",
        "--phases", "coverage,fuzzing", "--max-examples", str(max(1, requests // 10)), "--seed", "1",
        "--continue-on-failure", "--no-color",
    ]  # fmt: skip
    paths = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    found = re.search(r"(\d+) generated", done.stdout)
    if found is None:
        raise Refused(f"schemathesis said nothing of its cases: {done.stdout[-300:]}{done.stderr[-300:]}")
    if done.returncode:
        raise Refused(f"a {mode} request was answered wrongly: {done.stdout[-1500:]}")
    return int(found[1])
