"""`mamba3 bench`: the benchmarks of a checkout, which an installed package does not bring along."""

import importlib
import importlib.util
import sys
from pathlib import Path

import typer

import mamba3


def bench(context: typer.Context) -> None:
    """Benchmarks, from a checkout of the repository: kernels, cpu, numerics, serving; --help lists their options."""
    root = Path(mamba3.__file__).parents[1]
    if not (root / "benchmarks" / "__main__.py").exists():
        raise ValueError(
            "the benchmarks are in the repository and not in the installed package; clone it, install it there with "
            "pip install -e '.[bench]', and call mamba3 bench again."
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "the benchmarks draw with matplotlib, which is missing; pip install -e '.[bench]' in the checkout."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    importlib.import_module("benchmarks.__main__").app(context.args or ["--help"], prog_name="mamba3 bench")
