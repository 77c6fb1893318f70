"""The walls of the house: imports go one way, importing has no effects, documents name what exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mamba3"
MAY_IMPORT = {
    "ops": {"ops"},
    "nn": {"ops", "nn"},
    "lm": {"ops", "nn", "lm"},
    "convert": {"ops", "nn", "lm", "text", "convert"},
    "hf": {"ops", "nn", "lm", "hf"},
    "export": {"ops", "nn", "lm", "export"},
    "text": {"text"},
    "engine": {"ops", "nn", "lm", "text", "engine"},
    "serve": {"ops", "nn", "lm", "text", "engine", "serve"},
    "train": {"ops", "nn", "lm", "text", "train"},
    "evaluate": {"ops", "nn", "lm", "evaluate"},
    "tasks": {"ops", "nn", "lm", "tasks"},
    "cli": {"ops", "nn", "lm", "convert", "train", "evaluate", "tasks", "text", "engine", "serve", "cli"},
}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module] if node.module != "mamba3" else [f"mamba3.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mamba3" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        forbidden = imported_rooms(path) - MAY_IMPORT[room]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_every_room_is_known():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == set(MAY_IMPORT)


def test_importing_is_light_and_has_no_effects():
    """No optional library comes along, and the random state, threads and default dtype stay as they were."""
    script = (
        "import sys, torch; torch.manual_seed(3); before = (torch.get_rng_state().sum(), torch.get_num_threads(), "
        "torch.get_default_dtype()); import mamba3; "
        "assert before == (torch.get_rng_state().sum(), torch.get_num_threads(), torch.get_default_dtype()); "
        "heavy = {'transformers', 'peft', 'onnx', 'onnxruntime', 'torchao', 'lm_eval'}; "
        "heavy |= {'matplotlib', 'tokenizers', 'typer', 'huggingface_hub', 'triton'}; heavy &= set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


DOCUMENTS = (
    "mathematics.md",
    "design.md",
    "numerics.md",
    "transformers.md",
    "evaluation.md",
    "serving.md",
    "training.md",
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_what_exists(document):
    """Every `ops.something.name`, file and test named in a document is there."""
    text = (ROOT / "docs" / document).read_text()
    for module, name in re.findall(r"`((?:ops|nn|lm|hf|export)(?:\.\w+)*)\.(\w+)`", text):
        path = PACKAGE / Path(*module.split("."))
        source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        assert re.search(rf"\b{name}\b", source.read_text()), f"{document}: {module}.{name}"
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, f"{document}: {name}"
    for name in re.findall(r"`((?:mamba3|tests|benchmarks|docs)/[\w./]+)`", text):
        assert (ROOT / name).exists(), f"{document}: {name}"
