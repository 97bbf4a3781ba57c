"""What every command has: how it ends when its input is wrong, and the options that mean the same everywhere."""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from . import terminal
from .errors import CnqError

FILE = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
FORCE = click.option("--force", is_flag=True, help="Replace the output if it exists.")
THREADS = click.option("--threads", type=click.IntRange(0), default=0, help="0 = all cores.")
CTX = click.option("--ctx", "n_ctx", type=click.IntRange(16), default=512, show_default=True, help="Tokens of a chunk.")
ROUNDING = click.Choice(["sequential", "compensated", "plain"])  # quantize.ROUNDINGS, the most thorough first
FORMAT = click.option("--format", help="Prompt format, e.g. alpaca; a wrong name lists all. Default: the GGUF's own template.")


class Command(click.Command):
    """A command that ends in one line when something is wrong with its input; of `cnq`, or a program by itself."""

    def main(self, *args: Any, **options: Any) -> Any:
        prepare()
        return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CnqError as error:  # the user can act on it: the message, exit 1. Anything else is our bug.
            raise click.ClickException(terminal.one_line(str(error))) from error
        except KeyboardInterrupt:
            click.echo("\ninterrupted; nothing half-made was left behind", err=True)
            sys.exit(130)


class Cli(click.Group):
    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the road


def prepare() -> None:
    logging.getLogger("gguf").setLevel(logging.ERROR)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # a Windows console, or LANG=C
