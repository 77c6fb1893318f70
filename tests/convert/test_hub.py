"""Laws of models that come from the hub: what arrives is what lies there, and each way it can fail says what to do."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants

from mamba3.convert import convert_folder, hub, load_official, read_model
from mamba3.train.tokenizer import byte_tokenizer
from tests.convert.hub import Hub, point_at
from tests.convert.official import GOLDEN, random_model

REPO = "state-spaces/mamba3-siso-187m"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "official_lm_siso", folder)
    (folder / "expected.safetensors").unlink()
    return folder


@pytest.fixture
def server(tmp_path, source, monkeypatch):
    """The stand-in, with one repository; this process asks it, and keeps what it gets in a cache of its own."""
    with Hub({REPO: source}) as server:
        point_at(monkeypatch, server, tmp_path / "cache")
        yield server


def test_a_repository_is_read_as_its_folder_would_be(server, source):
    model = load_official(REPO, "heavy_tail")
    assert model.fingerprint() == load_official(source, "heavy_tail").fingerprint()
    assert sorted(server.served) == ["config.json", "pytorch_model.bin"]
    load_official(REPO, "heavy_tail")
    assert len(server.served) == 2, "the second time it comes from the cache"
    server.shutdown()
    server.server_close()
    assert load_official(REPO, "heavy_tail").fingerprint() == model.fingerprint(), "without network too"


def test_the_tokenizer_of_a_repository_is_carried_along(server, source, tmp_path):
    byte_tokenizer().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text("{}")
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 257}
    (source / "config.json").write_text(json.dumps(config))
    torch.save(random_model(config, dtype=torch.float32), source / "pytorch_model.bin")
    done = convert_folder(REPO, tmp_path / "to", decay="softplus")
    assert done.tokenizer == ("tokenizer.json", "tokenizer_config.json")
    assert (tmp_path / "to" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    # one that lies in another repository
    server.folders["else/where"] = source
    assert hub.find_tokenizer("else/where").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_connection_that_breaks_is_resumed_where_it_broke(server, source, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what came is kept by chunks, of 10 MB as a rule
    server.breaks = 2
    model = load_official(REPO, "heavy_tail")
    assert model.fingerprint() == load_official(source, "heavy_tail").fingerprint()
    size = (source / "pytorch_model.bin").stat().st_size
    first, second = (int(range.removeprefix("bytes=").removesuffix("-")) for range in server.ranges)
    assert size // 2 - 1000 < first <= size // 2 < second < size


@pytest.mark.filterwarnings("ignore")
def test_a_connection_that_stays_broken_says_so_and_a_later_try_gets_the_file(server, source, tmp_path):
    server.breaks = 10**6
    with pytest.raises(OSError, match=r"could not be had from the Hugging Face hub.*try again"):
        convert_folder(REPO, tmp_path / "to", decay="softplus")
    assert not (tmp_path / "to").exists()
    server.breaks = 0
    assert load_official(REPO, "heavy_tail").num_parameters() > 0


def test_each_refusal_says_what_to_do(server, source):
    server.gated.add(REPO)
    for server.gated_status in (401, 403):
        with pytest.raises(OSError, match=rf"{REPO} is gated.*its terms on .*{REPO} and log in \(`hf auth login`"):
            load_official(REPO, "heavy_tail")
    server.gated.clear()
    server.forbidden.add(REPO)
    with pytest.raises(OSError, match=r"does not give you .* \(403\)|could not be had.*403"):
        load_official(REPO, "heavy_tail")
    with pytest.raises(OSError, match=r"no such repository, or not for you\. Check the name"):
        read_model("nobody/nothing")
    server.folders["only/weights"] = source
    with pytest.raises(ValueError, match=r"only/weights has no tokenizer\.json.*save_pretrained"):
        hub.find_tokenizer("only/weights")
    server.folders["bare/repo"] = source.parent / "bare"
    server.folders["bare/repo"].mkdir()
    (server.folders["bare/repo"] / "README.md").write_text("nothing else")
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_model("bare/repo")


@pytest.mark.slow
def test_the_command_downloads_from_the_endpoint_in_the_environment(source, tmp_path):
    """A process of its own, told by HF_ENDPOINT alone: missing, gated, then converted and used."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}

    def mamba3(*arguments):
        command = [sys.executable, "-m", "mamba3.cli", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)

    with Hub({REPO: source}) as server:
        environment["HF_ENDPOINT"] = server.url
        missing = mamba3("convert", "nobody/nothing", tmp_path / "to")
        assert missing.returncode == 1 and "no such repository" in missing.stderr and "Traceback" not in missing.stderr
        server.gated.add(REPO)
        gated = mamba3("convert", REPO, tmp_path / "to", "--decay", "softplus")
        assert gated.returncode == 1 and f"Accept its terms on {server.url}/{REPO}" in gated.stderr
        assert not (tmp_path / "to").exists()
        server.gated.clear()
        done = mamba3("convert", REPO, tmp_path / "to", "--decay", "softplus")
        assert done.returncode == 0, done.stderr
        assert "between source and result: 0 " in done.stdout
