"""`mamba3 serve` and `mamba3 chat` as a person starts them."""

import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest

from mamba3.cli import main
from mamba3.cli.in_use import in_use
from mamba3.engine import Engine
from mamba3.train.tokenizer import byte_tokenizer
from tests.serve.conftest import lm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    lm().save_pretrained(tmp_path / "model")
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def test_a_server_told_to_stop_ends_what_is_under_way(folder, tmp_path):
    """SIGTERM: the stream goes on to its end, the process ends by itself, sessions are in files, logs tell no prompt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MAMBA3_API_KEYS": "alpha", "OMP_NUM_THREADS": "1"}
    command = ["-m", "mamba3", "serve", "--model", str(folder), "--port", str(port), "--sessions", str(tmp_path / "s")]
    with subprocess.Popen(
        [sys.executable, *command, "--rows", "2", "--no-save-turns", "--drain-seconds", "200"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as response:
                    assert json.load(response) == {"status": "ok"}
                break
            except OSError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="alpha", max_retries=0) as client:
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/sessions", b'{"id": "talk"}', {"Authorization": "Bearer alpha"}
            )
            asked.add_header("Content-Type", "application/json")
            urllib.request.urlopen(asked).close()
            stream = client.completions.create(
                model="model", prompt="a secret prompt", max_tokens=150, stream=True, logit_bias={"256": -100},
                extra_body={"session": "talk"}, stream_options={"include_usage": True},
            )  # fmt: skip
            parts = iter(stream)
            next(parts)
            process.send_signal(signal.SIGTERM)
            rest = list(parts)
            assert rest[-1].usage.completion_tokens == 150
        assert process.wait(200) == 0
        logged = process.stderr.read()
    events = [json.loads(line) for line in logged.splitlines()]
    assert events[0]["event"] == "serving" and events[-1]["event"] == "stopped"
    assert "secret" not in logged and "alpha" not in logged
    (file,) = (tmp_path / "s").rglob("*.safetensors")
    assert file.name == "talk.safetensors"


def test_one_server_at_a_time_has_a_folder_of_sessions(capsys, folder, tmp_path):
    with in_use(tmp_path / "s"), pytest.raises(SystemExit) as exit:
        main(["serve", "--model", str(folder), "--sessions", str(tmp_path / "s")])
    assert exit.value.code == 1 and "another one is writing" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "port", "why"), [("127.0.0.1", None, "in use"), ("nowhere.invalid", 1, "")])
def test_an_address_that_cannot_be_had_is_one_line(capsys, folder, host, port, why):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as exit:
        port = port or taken.getsockname()[1]
        main(["serve", "--model", str(folder), "--host", host, "--port", str(port)])
    told = capsys.readouterr().err
    assert exit.value.code == 1 and f"{host} at port {port} is none" in told and why in told and '"serving"' not in told


def say(monkeypatch, capsys, folder, lines, *more):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit) as exit:
        main(["chat", "--model", str(folder), "--temperature", "0", "--max-tokens", "6", *more])
    captured = capsys.readouterr()
    return exit.value.code or 0, captured.out, captured.err


def test_a_chat_goes_on_from_its_file(monkeypatch, capsys, folder, tmp_path):
    file = ["--session", str(tmp_path / "talk")]
    code, whole, _ = say(monkeypatch, capsys, folder, ["Hi", "", "How are you?", "Bye"])
    assert code == 0 and whole.count("\n") >= 3
    _, first, _ = say(monkeypatch, capsys, folder, ["Hi", "How are you?"], *file)
    _, second, told = say(monkeypatch, capsys, folder, ["Bye", "/quit", "never"], *file)
    assert first + second == whole and "goes on after 2 turns" in told
    _, again, _ = say(monkeypatch, capsys, folder, ["/rewind 2", "Bye"], *file)
    assert again == second
    say(monkeypatch, capsys, folder, ["/rewind 1"], *file)
    _, _, told = say(monkeypatch, capsys, folder, [], *file)
    assert "goes on after 1 turns" in told  # going back is kept too


def test_a_line_that_cannot_be_done_ends_no_chat(monkeypatch, capsys, folder):
    code, shown, told = say(monkeypatch, capsys, folder, ["Hi", "/rewind x", "/rewind 7", "Bye"])
    assert code == 0 and "/rewind needs the number of a turn" in told and "turn must lie in [0, 1]" in told
    assert shown == say(monkeypatch, capsys, folder, ["Hi", "Bye"])[1]


def test_a_reply_can_be_broken_off(monkeypatch, capsys, folder):
    """The first Ctrl-C ends the reply, not the conversation."""
    step, steps = Engine.step, []

    def counted(engine):
        steps.append(1)
        if len(steps) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    code, shown, told = say(monkeypatch, capsys, folder, ["Hi", "/quit"], "--max-tokens", "100000")
    assert code == 0 and 30 <= len(steps) < 40 and shown and "Breaking the reply off" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat-template", "missing.jinja"], "--chat-template must be `plain` or name a Jinja file"),
        (["--rows", "0"], "rows must be at least 1; it is 0"),
        (["--api-keys", "EMPTY"], "holds none"),
    ],
)
def test_mistakes_are_one_red_line(capsys, folder, tmp_path, arguments, message):
    (tmp_path / "empty").write_text("# none\n")
    arguments = [str(tmp_path / "empty") if a == "EMPTY" else a for a in arguments]
    with pytest.raises(SystemExit) as exit:
        main(["serve", "--model", str(folder), *arguments])
    assert exit.value.code == 1 and message in capsys.readouterr().err


def test_while_serving_the_collector_looks_past_what_was_there_before(folder, monkeypatch, capsys):
    """Objects frozen while the server runs, and none after; the log says whether steps are graphs."""
    from mamba3.serve import run

    frozen = []
    monkeypatch.setattr(run._Server, "run", lambda self, sockets: frozen.append(gc.get_freeze_count()))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["serve", "--model", str(folder), "--device", "cpu"])
    assert frozen[0] > 10_000 and gc.get_freeze_count() == 0
    facts = json.loads(capsys.readouterr().err.splitlines()[0])
    assert facts["graphs"] == "none: CUDA graphs need a CUDA device, and the model is on cpu"
