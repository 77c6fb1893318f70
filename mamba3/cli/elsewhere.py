"""What the demonstrations let another process do: go on from a state file, to the letter."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.panel import Panel

from mamba3.cli.console import console


def go_on_elsewhere(model: str, expected: str, state: Path, sampling: Mapping[str, Any], tokens: int) -> None:
    """Go on from `state` with `mamba3 generate` in a new process. Raises ValueError where it does not write `expected`."""
    command = [
        "generate",
        "--model",
        model,
        "--state-in",
        str(state),
        "--max-new-tokens",
        str(tokens),
        "--device",
        "cpu",
    ]
    command += [part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    console.print(f"The state is in {state} ({state.stat().st_size:,} bytes). A new process goes on from it:")
    console.print(f"[dim]mamba3 {escape(' '.join(command))}[/]", soft_wrap=True)
    found = in_new_process("mamba3.cli", *command)
    console.print(Panel(escape(found), title=f"process of its own, {tokens} tokens"))
    if found != expected:
        raise ValueError(
            f"going on from a saved state must give the text of never having stopped, which was {expected!r}, but gave "
            f"{found!r}; please report this."
        )
    console.print("[green]The same text, character for character, as in the process that never stopped.[/]")


def in_new_process(module: str, *arguments: str) -> str:
    """What `python -m module` with these arguments, on one thread, writes to stdout."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise ChildProcessError(
            f"`{module} {arguments[0]}` must end without an error, but ended with code {done.returncode}: "
            f"{done.stderr.decode(errors='replace').strip()}"
        )
    return done.stdout.decode()
