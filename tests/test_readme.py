"""The README's examples run as printed; the one that downloads is left out.

They find what they name: a folder `my-model` with a tokenizer, and `texts.jsonl`.
"""

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers

from mamba3 import Mamba3Config, Mamba3LM
from mamba3.cli.app import app

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "load_official" not in code]
NEEDS = {
    "mamba3.hf": ("transformers", "accelerate"), "mamba3.export": ("onnx", "onnxscript", "onnxruntime", "torchao"),
    "mamba3.evaluate": ("lm_eval", "olmo_eval"), "peft": ("peft",), "trl": ("trl",), "datasets": ("datasets",),
}  # fmt: skip
WORDS = ["def", "main", "import", "return", "x"]
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>"}

DOCUMENTS = [README, *(path.read_text() for path in (Path(__file__).parents[1] / "docs").glob("*.md"))]
COMMANDS = [
    line.split("   #")[0]
    for text in DOCUMENTS
    for block in re.findall(r"```sh\n(.*?)```", text, re.S)
    for line in block.splitlines()
    if line.startswith("mamba3 ")
]


def furnish(folder):
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), "?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = Mamba3Config(vocab_size=8, d_model=16, layers=("mamba3",), d_intermediate=16, d_state=8, headdim=8)
    Mamba3LM(config).save_pretrained(folder / "my-model")
    tokenizer.save(str(folder / "my-model" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?", **SPECIAL}
    (folder / "my-model" / "tokenizer_config.json").write_text(json.dumps(settings))
    lines = (json.dumps({"text": " ".join(WORDS[: 1 + i % 5])}) for i in range(8))
    (folder / "texts.jsonl").write_text("\n".join(lines))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:.*will be removed in v6:FutureWarning"
)  # TRL and PEFT use what transformers renamed
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run_as_printed(code, tmp_path, monkeypatch):
    for module, libraries in NEEDS.items():
        for library in libraries if re.search(rf"^(import|from) {module}\b", code, re.M) else ():
            if importlib.util.find_spec(library) is None:
                pytest.skip(f"this example needs {library}")
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    if "load_dataset" in code:
        monkeypatch.setattr(importlib.import_module("datasets.config"), "HF_DATASETS_CACHE", tmp_path / "cache")
    exec(compile(code, "README.md", "exec"), {})


def test_what_the_readme_points_to_exists():
    for name in re.findall(r"\]\((docs/[\w./-]+|benchmarks/[\w./-]+)\)", README):
        assert (Path(__file__).parents[1] / name).exists(), name


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_and_options_named_exist(line):
    command, (_, *arguments) = typer.main.get_command(app), shlex.split(line)
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {argument for argument in arguments if argument.startswith("-")} <= known
