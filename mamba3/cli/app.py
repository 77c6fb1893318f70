"""The commands in one table, and what becomes of an error: one red line and exit code 1; Ctrl-C is 130."""

import os
import sys
from collections.abc import Sequence

import typer
from rich.markup import escape
from typer.core import TyperGroup

from mamba3.cli.bench import bench
from mamba3.cli.chat import chat
from mamba3.cli.console import errors
from mamba3.cli.convert import convert
from mamba3.cli.demo import demo
from mamba3.cli.demo_train import demo_train
from mamba3.cli.eval import evaluate
from mamba3.cli.generate import generate
from mamba3.cli.info import info
from mamba3.cli.interrupt import INTERRUPTED
from mamba3.cli.serve import serve
from mamba3.cli.task import task_app
from mamba3.cli.train import train


class _Group(TyperGroup):
    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of our output has gone, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (ValueError, OSError, ArithmeticError) as error:
            errors.print(f"[bold red]error:[/] [red]{escape(' '.join(str(error).split()))}[/]", soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    help="Mamba-3: train, generate and look inside, on any machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, generate, chat, serve, info, convert, demo, demo_train):
    app.command()(command)
app.command("eval")(evaluate)
# What follows `bench` is for the benchmarks' own command line, --help too.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(bench)
app.add_typer(task_app, name="task")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits the process."""
    app(arguments)
