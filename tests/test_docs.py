"""Documentation is checked like code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cnq.cli import cli

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]


def test_cli_page_is_fresh():
    subprocess.run([sys.executable, str(ROOT / "tools" / "cli_docs.py"), "--check"], check=True)


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_has_help_with_an_example_and_json(name):
    command = cli.commands[name]
    assert command.help
    assert f"cnq {name} " in command.help or command.help.rstrip().endswith(f"cnq {name}")
    assert any(p.name == "as_json" for p in command.params)


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_the_readme_names_only_commands_and_options_that_exist(readme):
    blocks = re.findall(r"```(?:console|bash)\n(.*?)```", readme.read_text(encoding="utf-8"), re.S)
    lines = [line.removeprefix("$ ").split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    seen = 0
    for line in lines:
        words = line.split()
        if words[:1] == ["make"] and len(words) > 1:
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.M), line
            seen += 1
        if words[:1] == ["cnq"]:
            command = cli.commands[words[1]]
            known = {option for p in command.params for option in p.opts}
            assert {w.split("=")[0] for w in words[2:] if w.startswith("-")} <= known, line
            seen += 1
    assert seen >= 6


def test_both_readmes_show_the_same_commands():
    def commands(path):
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("$ ", "make ", "cnq "))]

    english, chinese = ([line.split(" #")[0].rstrip() for line in commands(p)] for p in READMES)
    assert english == chinese


def test_help_exits_well():
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in cli.commands)
