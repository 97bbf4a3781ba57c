"""Write docs/cli.md from the help of the commands; --check fails when it is stale. Run by `make docs` and `make check`."""

import sys
from pathlib import Path

import click

from cnq.cli import cli

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def page() -> str:
    """Every command's help, as a terminal of 100 columns shows it."""
    parts = ["# Commands", "", "Written by `make docs` from the help of the commands.", ""]
    parts += ["```", _help(cli, "cnq"), "```", ""]
    for name, command in cli.commands.items():
        parts += [f"## cnq {name}", "", "```", _help(command, f"cnq {name}"), "```", ""]
    return "\n".join(parts)


def _help(command: click.Command, name: str) -> str:
    settings = {"terminal_width": 100, "max_content_width": 100} | command.context_settings
    with click.Context(command, info_name=name, **settings) as context:
        return command.get_help(context).rstrip()


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is stale: run `make docs`")
    else:
        PAGE.write_text(page(), encoding="utf-8")
