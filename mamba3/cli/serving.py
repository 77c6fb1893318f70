"""What `mamba3 serve` and `mamba3 chat` share: the extra they need, the template they speak by."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mamba3.engine import Engine
    from mamba3.serve import ChatTemplate

_LIBRARIES = ("fastapi", "uvicorn", "prometheus_client", "openai", "jinja2")


def need_serve_extra() -> None:
    """ValueError that names what is missing."""
    missing = [name for name in _LIBRARIES if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}; pip install 'mamba3[serve]'.")


def make_ready(engine: "Engine") -> None:
    """Compile the engine's kernels and capture its graphs, with a bar on stderr where that is a terminal; nothing on a CPU."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        for title, work in (("compiling kernels", engine.rehearse()), ("capturing graphs", engine.capture())):
            task = bar.add_task(title, total=None)
            for done, total in work:
                bar.update(task, completed=done, total=total)
            bar.remove_task(task)


def find_template(given: str | None, model: str, tokenizer: "Tokenizer") -> "ChatTemplate | None":
    """The template given (`plain`, or a file), else the one beside the model, else None."""
    from mamba3.cli.models import find_model
    from mamba3.serve import PLAIN, PLAIN_STOPS, ChatTemplate

    if given is None:
        return ChatTemplate.of_model(find_model(model), tokenizer)
    if given == "plain":
        return ChatTemplate(PLAIN, tokenizer, stops=PLAIN_STOPS)
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"--chat-template must be `plain` or name a Jinja file, but {given} is neither.")
    return ChatTemplate(path.read_text(encoding="utf-8"), tokenizer)
