"""The `mamba3` command: train, generate, info, convert, demo. Modules that need torch are loaded by the command that runs."""

from mamba3.cli.app import main

__all__ = ["main"]
