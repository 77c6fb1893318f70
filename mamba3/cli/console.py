"""Where the command line writes: results to stdout, everything about them to stderr."""

from rich.console import Console

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)
