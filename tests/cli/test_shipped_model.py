"""The model that comes with the package: what it weighs, what it knows, what its demonstration shows."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mamba3.cli.models import SHIPPED, find_model, load_model
from mamba3.text.encode import encode, end_of_text

ROOT = Path(__file__).parents[2]
PLACE = SHIPPED["books"]
# The first sentences of George Gissing's "New Grub Street" (1891), in the public domain.
TEXT = (
    "As the Milvains sat down to breakfast the clock of Wattleborough parish church struck eight; it was two miles away, "
    "but the strokes were borne very distinctly on the west wind this autumn morning. Jasper, listening before he cracked "
    "an egg, remarked with cheerfulness: There's a man being hanged in London at this moment."
)


@pytest.fixture(scope="module")
def loaded():
    return load_model("books", None, "cpu", "float32")


def test_it_fits_a_repository_and_the_package_has_all_of_it():
    weights = [file.stat().st_size for file in PLACE.glob("*.safetensors")]
    assert sum(weights) <= 48_000_000 and max(weights) < 2**24
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["mamba3"]
    packed = {file for pattern in patterns for file in (ROOT / "mamba3").glob(pattern)}
    assert {file for file in PLACE.rglob("*") if file.is_file()} <= packed


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    assert find_model("books") == PLACE
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    with pytest.raises(ValueError, match="a folder of that name here, which comes first and holds no model; rename it"):
        find_model("books")
    (tmp_path / "books" / "config.json").write_text("{}")
    assert find_model("books") == Path("books")


@torch.no_grad()
def test_it_has_learned_to_read(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([[end_of_text(tokenizer), *encode(tokenizer, [TEXT])[0].tolist()]])
    logits = model(ids)[0, :-1, : model.config.vocab_size]
    bits = F.cross_entropy(logits, ids[0, 1:], reduction="sum") / torch.log(torch.tensor(2.0)) / len(TEXT.encode())
    assert bits < 1.8  # knowing nothing of a vocabulary of 8,192 is 3.2; the whole test set is in the card


def test_the_card_says_what_was_measured():
    card, result = (PLACE / "README.md").read_text(), json.loads((PLACE / "result.json").read_text())
    weights = sum(file.stat().st_size for file in PLACE.glob("*.safetensors"))
    assert result["bytes"] == weights and f"{weights:,} bytes" in card and not result["quick"]
    state = load_model("books", None, "cpu", None)[0].init_state(1).nbytes
    assert result["state_bytes"] == state and f"however long, is {state:,} bytes" in card.replace("\n", " ")
    for tokens, found in result["test"].items():
        assert f"| {int(tokens):,} | {found['perplexity']:.2f} | {found['bits_per_byte']:.3f} |" in card
    assert result["step"] == result["steps"] and "unfinished" not in card


def test_the_demonstration_writes_a_page_and_goes_on_with_it(tmp_path):
    command = [sys.executable, "-m", "mamba3.cli", "demo", "--tokens", "24"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "character for character" in done.stdout and not list(tmp_path.iterdir())
    assert re.search(r"24 tokens, \d+ words in [\d.]+ s on one\s+thread", done.stdout)
