"""Laws of the command line: what it prints, how it fails, and that text goes on as if it had never stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mamba3.cli import main
from mamba3.cli.in_use import in_use
from mamba3.cli.memory import measure
from mamba3.cli.session import Session
from mamba3.cli.train import model_config
from mamba3.convert import load_official
from mamba3.lm import LMState, Mamba3Config, Mamba3LM
from mamba3.lm.generate import Sampling
from mamba3.text.stop import StopText
from mamba3.train.report import read_metrics
from mamba3.train.tokenizer import byte_tokenizer
from tests.convert.hub import Hub, point_at

SMALL = [
    "--steps", "4", "--warmup-steps", "1", "--seq-len", "16", "--batch-tokens", "32", "--eval-tokens", "32", "--d-model",
    "16", "--layers", "1", "--d-state", "8", "--headdim", "8", "--d-intermediate", "16", "--device", "cpu",
]  # fmt: skip


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command."""
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return exit.value.code or 0, captured.out, captured.err


def failure(capsys, *arguments) -> str:
    code, out, err = run(capsys, *arguments)
    assert code == 1 and "Traceback" not in out + err
    line = err.strip()
    assert line.startswith("error:") and "\n" not in line
    return line


def save_model(folder: Path, tokenizer: bool = True) -> Path:
    torch.manual_seed(3)
    layers = ("mamba3", "attention")
    config = Mamba3Config(
        vocab_size=257, d_model=16, layers=layers, attn_heads=2, d_state=8, headdim=8, tie_embeddings=False
    )
    model = Mamba3LM(config)
    with torch.no_grad():
        model.embedding.weight.normal_()  # an untrained model that does not merely repeat a byte
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_model(tmp_path / "model")


# -- train


def test_train_then_generate_from_the_run_folder(capsys, tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(6):
        (tmp_path / "corpus" / f"{i}.md").write_text(f"# Heading {i}\n\nsome words to read\n" * 3)
    out = tmp_path / "run"
    code, shown, _ = run(capsys, "train", tmp_path / "corpus", "--glob", "*.md", "--out", out, *SMALL)
    assert code == 0
    for part in ("step      0  validation loss", "perplexity", "bits per byte", "parameters on cpu; a new run"):
        assert part in shown
    for place in (out, out / "model"):
        code, _, err = run(capsys, "generate", "--model", place, "--prompt", "# H", "--max-new-tokens", 5)
        assert code == 0 and re.search(r"\d tokens? in", err)  # fewer than 5 where the text ends
    code, shown, _ = run(capsys, "train", tmp_path / "corpus", "--glob", "*.md", "--out", out, *SMALL)
    assert code == 0 and "going on after step 4" in shown
    assert "train.seed was 0, is 1" in failure(
        capsys, "train", tmp_path / "corpus", "--glob", "*.md", "--out", out, *SMALL, "--seed", 1
    )


def test_a_short_training_warms_up_for_a_tenth_of_it(capsys):
    """Unless the warm-up was chosen: the default of 50 steps is no reason to refuse 40."""
    code, shown, told = run(capsys, "train", "--steps", 40, "--show-config")
    assert code == 0 and json.loads(shown)["warmup_steps"] == 4 and "rises over 4 of 40 steps" in told
    code, shown, told = run(capsys, "train", "--steps", 51, "--show-config")
    assert code == 0 and json.loads(shown)["warmup_steps"] == 50 and not told
    assert "below steps = 40" in failure(capsys, "train", "--steps", 40, "--warmup-steps", 50, "--show-config")


def test_train_reads_a_configuration_file_and_options_win(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    (tmp_path / "c.json").write_text(json.dumps({"steps": 100, "warmup_steps": 1, "seq_len": 8, "batch_tokens": 16}))
    shape = SMALL[SMALL.index("--d-model") :]
    arguments = ["train", tmp_path / "a.txt", "--out", tmp_path / "run", "--config", tmp_path / "c.json", "--steps", 3]
    code, _, err = run(capsys, *arguments, *shape)
    assert code == 0, err
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["tokens"] for line in lines] == [16] * 3


@pytest.mark.parametrize(
    ("arguments", "law"),
    [
        (["absent.txt"], "does not exist|absent.txt does not"),
        (["empty.txt"], "empty"),
        (["binary.bin"], "must be UTF-8 text"),
        (["lines.jsonl"], "line 2"),
        ([".", "--glob", "*.rs"], "none for glob"),
        (["good.txt", "--resume", "--restart"], "exclude each other"),
        (["good.txt", "--resume"], "has none"),
        (["good.txt", "--steps", "0"], "steps must be at least 1"),
        (["good.txt", "--headdim", "7"], "7"),
        (["good.txt", "--preset", "siso-1m"], "siso-1m"),
        (["good.txt", "--device", "abacus"], "device must be"),
        (["good.txt", "--device", "cuda:99"], "cuda:99"),
        (["good.txt", "--tokenizer", "absent.json"], "absent.json holds no tokenizer.json"),
        (["good.txt", "--config", "absent.json"], "absent.json does not exist"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_exit_code_1(capsys, tmp_path, monkeypatch, arguments, law):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("binary.bin").write_bytes(bytes(range(200, 256)))
    Path("lines.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    Path("good.txt").write_text("text\n" * 50)
    line = failure(capsys, "train", *SMALL, *arguments)
    assert any(part in line for part in law.split("|"))


def test_one_process_at_a_time_trains_in_a_folder(capsys, tmp_path):
    """Two would each remove what the other is writing."""
    (tmp_path / "a.txt").write_text("some text to read\n" * 20)
    command = ["train", tmp_path / "a.txt", *SMALL, "--out", tmp_path / "run"]
    with in_use(tmp_path / "run"):
        assert "another one is writing" in failure(capsys, *command)
        assert [file.name for file in (tmp_path / "run").iterdir()] == []
    assert not (tmp_path / "run").exists()  # nothing was put into it
    code, _, err = run(capsys, *command)
    assert code == 0 and (tmp_path / "run" / "model").is_dir(), err


def test_ctrl_c_saves_a_checkpoint_and_exits_with_130(tmp_path):
    (tmp_path / "a.txt").write_text("some text to read\n" * 200)
    command = [sys.executable, "-m", "mamba3.cli", "train", "a.txt", *SMALL, "--steps", "100000", "--save-every", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps[-1]:08d}").is_dir()
    assert "Stopping after this step" in err and f"Stopped after step {steps[-1]:,}" in out


@pytest.mark.parametrize(
    ("preset", "layers", "every", "shape", "expected"),
    [
        (None, None, None, {}, {"d_model": 256, "layers": 4, "d_intermediate": 512, "attention": []}),
        (None, 6, 3, {"d_model": 128}, {"d_model": 128, "layers": 6, "d_intermediate": 256, "attention": [2, 5]}),
        ("mimo-180m", None, None, {}, {"d_model": 768, "layers": 12, "d_intermediate": 1280, "attention": []}),
        ("siso-180m", None, 6, {"d_state": 64}, {"d_state": 64, "layers": 12, "attention": [5, 11]}),
        ("siso-180m", 2, None, {"d_intermediate": 0}, {"layers": 2, "d_intermediate": 0, "attention": []}),
    ],
)
def test_sizes_become_a_configuration(preset, layers, every, shape, expected):
    chosen = {"preset": preset, "layers": layers, "attention_every": every, **shape}
    config = model_config(300, {key: value for key, value in chosen.items() if value is not None})
    found = config.to_dict() | {
        "layers": len(config.layers), "attention": [i for i, kind in enumerate(config.layers) if kind == "attention"]
    }  # fmt: skip
    assert config.vocab_size == 300
    assert {key: found[key] for key in expected} == expected


# -- generate


def tokens_from(session, sampling, count):
    return list(session.tokens(sampling, count))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.9, "top_k": 50},
        {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.3, "min_p": 0.01},
    ],
)
def test_a_session_is_the_library_loop_and_goes_on_from_its_file(folder, tmp_path, settings):
    model, sampling = Mamba3LM.from_pretrained(folder).eval(), Sampling(**settings)
    prompt = [72, 101, 108, 108, 111]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, seed=5, **settings).tokens[0].tolist()

    def begin():
        session = Session.new(model)
        session.generator.manual_seed(5)
        session.add(prompt)
        return session

    assert tokens_from(begin(), sampling, 24) == expected
    for stop in (1, 2, 23):
        session = begin()
        first = tokens_from(session, sampling, stop)
        session.save(tmp_path / "state")
        rest = tokens_from(Session.load(tmp_path / "state", model), sampling, 24 - stop)
        assert first + rest == expected
    assert LMState.load(tmp_path / "state", model).tokens.tolist() == [len(prompt) + 22]


def test_text_stopped_anywhere_and_continued_is_the_text_of_never_having_stopped(capfdbinary, folder, tmp_path):
    def generated(*arguments) -> bytes:
        with pytest.raises(SystemExit) as exit:
            main(["generate", "--model", str(folder), "--temperature", "1.1", *map(str, arguments)])
        assert not exit.value.code
        return capfdbinary.readouterr().out

    whole = generated("--prompt", "héllo", "--seed", 7, "--max-new-tokens", 40)
    assert whole.decode().encode() == whole and len(whole) > 40
    state = tmp_path / "s.safetensors"
    for count in (1, 13, 14, 15, 16, 39):
        first = generated("--prompt", "héllo", "--seed", 7, "--max-new-tokens", count, "--state-out", state)
        assert first + generated("--state-in", state, "--max-new-tokens", 40 - count) == whole


def test_a_prompt_goes_on_from_a_saved_state_as_one_longer_prompt(capsys, folder, tmp_path):
    state = tmp_path / "s.safetensors"
    base = ["generate", "--model", folder, "--temperature", 0]
    _, first, _ = run(capsys, *base, "--prompt", "abc", "--max-new-tokens", 1, "--state-out", state)
    _, rest, _ = run(capsys, *base, "--state-in", state, "--prompt", "def", "--max-new-tokens", 8)
    (tmp_path / "prompt").write_text(f"abc{first}def")
    _, whole, _ = run(capsys, *base, "--prompt-file", tmp_path / "prompt", "--max-new-tokens", 8)
    if "\ufffd" not in first:
        assert rest == whole


def test_generation_ends_before_a_stop_text(capsys, folder):
    base = ["generate", "--model", folder, "--seed", 1, "--temperature", 1.0, "--max-new-tokens", 60]
    _, whole, told = run(capsys, *base)
    assert told.startswith("\n")  # the text ended no line, and what is told of it may follow on the same terminal
    stop = whole[20:23]
    _, short, _ = run(capsys, *base, "--stop", "not in there", "--stop", stop)
    assert short == whole[: whole.index(stop)]


@pytest.mark.parametrize("pieces", [["abSTOPcd"], list("abSTOPcd"), ["abS", "TOP", "cd"], ["abST", "OPcd"]])
def test_a_stop_text_is_found_across_pieces(pieces):
    output = StopText(["STOP", "xyz"])
    shown = ""
    for piece in pieces:
        shown += output.push(piece)
        if output.found:
            break
    assert shown == "ab" and output.found


def test_what_only_looked_like_a_stop_text_is_shown():
    output = StopText(["STOP"])
    assert output.push("a ST") + output.push("A ST") + output.finish() == "a STA ST" and not output.found


@pytest.mark.parametrize(
    ("arguments", "law"),
    [
        (["--model", "absent"], "does not exist"),
        (["--model", "."], "is neither"),
        (["--model", "bare"], "give one with --tokenizer FILE"),
        (["--model", "model", "--tokenizer", "model/config.json"], "not a tokenizer"),
        (["--model", "model", "--max-new-tokens", "0"], "at least 1"),
        (["--model", "model", "--top-p", "2"], "top_p must"),
        (["--model", "model", "--dtype", "int8"], "dtype must"),
        (["--model", "model", "--state-in", "absent"], "save one with --state-out"),
        (["--model", "model", "--state-in", "model/model.safetensors"], "not a state"),
        (["--model", "model", "--state-in", "cut"], "truncated"),
        (["--model", "bare", "--tokenizer", "model", "--state-in", "state"], "another model"),
        (["--model", "model", "--prompt", "a", "--prompt-file", "cut"], "exclude each other"),
        (["--model", "model", "--prompt-file", "absent"], "does not exist"),
        (["--model", "model", "--prompt-file", "model"], "must name a text file, but model is a folder"),
        (["--model", "model", "--prompt-file", "cut"], "must be UTF-8"),
        (["--model", "model", "--stop", ""], "at least one character"),
        (["--model", "model", "--state-out", "absent/state"], "absent is none"),
    ],
)
def test_what_cannot_be_generated_is_one_line_and_exit_code_1(capsys, tmp_path, monkeypatch, arguments, law):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    other = save_model(tmp_path / "bare", tokenizer=False)
    model = Mamba3LM.from_pretrained(other)
    torch.nn.init.normal_(model.embedding.weight)
    model.save_pretrained(other)
    session = Session.new(Mamba3LM.from_pretrained(tmp_path / "model"))
    session.add([1, 2])
    tokens_from(session, Sampling(), 2)
    session.save(tmp_path / "state")
    (tmp_path / "cut").write_bytes((tmp_path / "state").read_bytes()[:-50] + b"\xff")
    assert law in failure(capsys, "generate", "--max-new-tokens", "2", *arguments)


def test_a_full_disk_leaves_the_state_that_was_there(folder, tmp_path, monkeypatch):
    model = Mamba3LM.from_pretrained(folder)
    session = Session.new(model)
    session.add([1, 2])
    session.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    tokens_from(session, Sampling(), 2)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("mamba3.ops.state_file.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        session.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["model", "state"] or len(list(tmp_path.iterdir())) == 2


# -- the rest


def test_info_names_versions_devices_and_implementations(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for part in ("mamba3", torch.__version__, "cpu", "threads", "chunked", "reference", "Scan on cpu"):
        assert part in out


def test_help_lists_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(name in out for name in ("train", "generate", "info", "convert", "demo"))


def test_convert_writes_the_model_that_the_library_reads(capsys, tmp_path):
    source = Path(__file__).parents[1] / "golden" / "official" / "official_lm_mimo"
    code, out, err = run(capsys, "convert", source, tmp_path / "to", "--decay", "softplus", "--dtype", "float64")
    assert code == 0, err
    assert "named by the argument" in out and "--tokenizer FILE" in out
    ids = torch.arange(20)[None]
    expected = load_official(source, "softplus", torch.float64)(ids)
    torch.testing.assert_close(Mamba3LM.from_pretrained(tmp_path / "to")(ids), expected, rtol=0, atol=0)
    assert "tokenizer" in failure(capsys, "convert", source, tmp_path / "again")
    assert "--overwrite" in failure(capsys, "convert", source, tmp_path / "to")


def test_generate_reads_every_layout_and_finds_the_tokenizer(capsys, folder, tmp_path):
    settings = ["--prompt", "abc", "--max-new-tokens", 12, "--temperature", 0]
    expected = run(capsys, "generate", "--model", folder, *settings)[1]
    official = Mamba3LM.from_pretrained(folder)
    for layout in ("transformers", "official"):
        made = tmp_path / layout
        code, out, err = run(capsys, "convert", folder, made, "--to", layout, "--max-shard-size", "5GB")
        assert code == 0, err
        assert "tokenizer.json carried along" in out and "source and result: 0 " in out
        assert run(capsys, "generate", "--model", made, *settings)[1] == expected
        (made / "tokenizer.json").rename(tmp_path / "tokenizer.json")
        line = failure(capsys, "generate", "--model", made, *settings)
        assert "--tokenizer FILE" in line and ("Llama-3.1-8B (gated" in line) == (layout == "official")
        for tokenizer in (tmp_path / "tokenizer.json", tmp_path):
            assert run(capsys, "generate", "--model", made, "--tokenizer", tokenizer, *settings)[1] == expected
    small = Mamba3LM(replace(official.config, vocab_size=100))
    small.save_pretrained(tmp_path / "small")
    line = failure(capsys, "generate", "--model", tmp_path / "small", "--tokenizer", folder, *settings)
    assert "goes up to token 256 and the model has embeddings for 104" in line


def test_models_and_tokenizers_of_the_hub(capsys, folder, tmp_path, monkeypatch):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    settings = ["--prompt", "abc", "--max-new-tokens", 3, "--temperature", 0]
    expected = run(capsys, "generate", "--model", folder, *settings)[1]
    with Hub({"someone/model": folder, "meta/tokenizer": folder}) as server:
        point_at(monkeypatch, server, tmp_path / "cache")
        assert run(capsys, "generate", "--model", "someone/model", *settings)[1] == expected
        server.gated.add("meta/tokenizer")
        line = failure(capsys, "generate", "--model", folder, "--tokenizer", "meta/tokenizer", *settings)
        assert "meta/tokenizer is gated" in line and "hf auth login" in line
        line = failure(capsys, "generate", "--model", "someone/else", *settings)
        assert "no such repository" in line and "Check the name" in line


def test_the_state_is_as_large_after_many_tokens_as_after_a_few():
    model = Mamba3LM(Mamba3Config(vocab_size=16, d_model=16, layers=("mamba3",), d_state=8, headdim=8)).eval()
    (_, first, _), (read, last, _) = measure(model, np.arange(7) % 16, [10, 1205])
    assert (read, first) == (1205, last)


@pytest.mark.slow
def test_the_demonstration_runs_and_runs_again(tmp_path):
    command = [sys.executable, "-m", "mamba3.cli", "demo-train", "--seconds", "5"]
    for expected in ("a new run", "going on after step"):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        for part in (expected, "character for character", "State: equal", "What next"):
            assert part in done.stdout


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mamba3", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr
