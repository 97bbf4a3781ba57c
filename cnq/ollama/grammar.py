"""Modelfiles as Ollama reads them, and values written so that it reads them back.

Grammar: ollama parser/parser.go, as of v0.32 (2026-08). There are no escapes. A value ends with its line, or, if it begins with
quotes, with the first line that ends with as many; everything between is kept, but for the characters that Go does not print:
those vanish everywhere, without a word.
"""

import re
from dataclasses import dataclass, replace

from ..errors import OllamaError

COMMANDS = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message", "requires",
)  # fmt: skip
ROLES = ("system", "user", "assistant")
_BLANKS, _LINE_ENDS = " \t", "\r\n"
_NAME, _KEY, _COMMENT = re.compile(r"(?s:.)[A-Za-z]*"), re.compile(r"\w*", re.ASCII), re.compile(r"[^\r\n]*")


@dataclass(frozen=True)
class Command:
    """name: in small letters. key: of a parameter its name, of a message its role."""

    name: str
    value: str
    key: str = ""


def parse(text: str) -> list[Command]:
    """The commands of a Modelfile. Raises OllamaError where Ollama would refuse it."""
    text = text.removeprefix("\ufeff")
    commands, at = [], 0
    while at < len(text):
        if text[at] in _BLANKS + _LINE_ENDS:
            at += 1
        elif text[at] == "#":
            _, at = _word(_COMMENT, text, at)
        else:
            command, at = _command(text, at)
            commands.append(command)
    if not any(command.name == "from" for command in commands):
        raise OllamaError("the Modelfile has no FROM line.")
    return commands


def _command(text: str, at: int) -> tuple[Command, int]:
    """The command that begins at a place, and where it ends."""
    start, key = at, ""
    word, at = _word(_NAME, text, at)
    name = kept(word).lower()
    if name not in COMMANDS or text[at : at + 1] not in (" ", "\t"):
        raise _refused(text, start, f"{word!r} begins no command ({', '.join(COMMANDS).upper()})")
    at += 1
    if name in ("parameter", "message"):
        key, at = _word(_KEY, text, at)
        if text[at : at + 1] not in (" ", "\t") or (name == "message" and key not in ROLES):
            raise _refused(text, start, f"{name.upper()} {key!r} is not followed by a value, or no role")
        at += 1
    value: list[str] = []
    for end in range(at, len(text)):
        c = text[end]
        if c in _LINE_ENDS and (whole := _unquoted(value)) is not None:
            return Command(name, whole, key), end + 1
        value.append(c)
    if (whole := _unquoted(value)) is None:
        raise _refused(text, start, "its quotes do not end")
    return Command(name, whole, key), len(text)


def _word(pattern: re.Pattern[str], text: str, at: int) -> tuple[str, int]:
    found = pattern.match(text, at)
    assert found
    return found[0], found.end()


def _unquoted(value: list[str]) -> str | None:
    """A value without its quotes; None while they are open."""
    text = kept("".join(value)).strip(_BLANKS + _LINE_ENDS)
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def _refused(text: str, at: int, why: str) -> OllamaError:
    return OllamaError(f"Modelfile, line {text.count(chr(10), 0, at) + 1}: {why}.")


def kept(text: str) -> str:
    """The text without the characters that Ollama drops: full-width and no-break spaces, joiners, private use and the like."""
    return "".join(c for c in text if c.isprintable() or c in _BLANKS + _LINE_ENDS)


def written(command: Command) -> str:
    """A command as a Modelfile has it: read back it is the same, but for characters that Ollama drops.

    Raises OllamaError for a value that no quotes can hold: one with a line that ends in three of them.
    """
    head = f"{command.name.upper()} {command.key} " if command.key else f"{command.name.upper()} "
    want = [replace(command, value=kept(command.value)), Command("from", "x")]
    for value in (command.value, f'"""{command.value}"""'):
        if _reads(f"{head}{value}\nFROM x\n") == want:
            return head + value
    raise OllamaError(
        f"a Modelfile cannot hold {command.name.upper()} {command.value[:80]!r}: a line of it ends in three quotes. "
        "Make the model with --create, which hands it over without a Modelfile."
    )


def _reads(text: str) -> list[Command] | None:
    try:
        return parse(text)
    except OllamaError:
        return None
