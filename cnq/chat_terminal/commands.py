"""What a line that begins with a slash does to a conversation. Nothing here draws."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from rich.filesize import decimal

from .. import params, sessions
from ..chat import Chat
from ..errors import CnqError
from .status import meter

_COMMAND = re.compile(r"/([A-Za-z]\w*)(?:\s+(.*))?", re.DOTALL)
_WISH = re.compile(r"(\w+)\s*=\s*([^\s,，]+)")


@dataclass(frozen=True)
class Reply:
    """text: to be shown. answer: pieces of a new answer. leave: the conversation ends. changed: it is another than before."""

    text: str = ""
    answer: Iterator[str] | None = None
    leave: bool = False
    changed: bool = False


@dataclass(frozen=True)
class Command:
    """arguments: as in the help. run: given the chat and what stands after the command."""

    arguments: str
    what: str
    run: Callable[[Chat, str], Reply]


def is_command(text: str) -> bool:
    """/system and the like; a path, as /etc/hosts, is none, nor is what begins with a space."""
    return _COMMAND.fullmatch(text) is not None


def run(chat: Chat, text: str) -> Reply:
    """Raises CnqError: no such command, or what it was given is not what it needs."""
    match = _COMMAND.fullmatch(text)
    assert match
    name, rest = match[1].lower(), (match[2] or "").strip()
    if name not in COMMANDS:
        raise CnqError(f"there is no command /{name}; {_nearest(name)}/help lists all. A space before it makes it a question.")
    return COMMANDS[name].run(chat, rest)


def _nearest(name: str) -> str:
    begun = [known for known in COMMANDS if known.startswith(name)]
    near = begun or get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
    return f"the nearest is {' or '.join('/' + known for known in near)}. " if near else ""


def _help(chat: Chat, rest: str) -> Reply:
    lines = [f"/{name} {c.arguments}".ljust(24) + c.what for name, c in COMMANDS.items()]
    keys = {
        "Enter": 'send; after \\, or within """ … """, a new line',
        "Alt-Enter": "a new line (also Esc, then Enter)",
        "Ctrl-C": "stop an answer; clear what is typed",
        "Ctrl-D": "leave",
    }
    return Reply("\n".join([*lines, "", *(key.ljust(24) + what for key, what in keys.items())]))


def _system(chat: Chat, rest: str) -> Reply:
    if not rest:
        return Reply(chat.system or "there is no system text but the prompt format's own.")
    chat.system = None if rest == "-" else rest
    return Reply(
        "the system text is removed." if rest == "-" else "the system text is set; the conversation goes on.", changed=True
    )


def _reset(chat: Chat, rest: str) -> Reply:
    chat.reset()
    return Reply("the conversation is forgotten" + (", the system text stays." if chat.system else "."), changed=True)


def _regen(chat: Chat, rest: str) -> Reply:
    fixed = chat.sampling.temperature <= 0 or chat.sampling.seed != params.RANDOM
    answer = chat.again()
    return Reply(
        "temperature 0 or a fixed seed gives the same answer again: see /params" if fixed else "", answer, changed=True
    )


def _undo(chat: Chat, rest: str) -> Reply:
    question = chat.undo()
    if question is None:
        raise CnqError("there is nothing to undo.")
    first = question.strip().partition("\n")[0]
    return Reply(f"taken back: {first if len(first) <= 30 else first[:29] + '…'}", changed=True)


def _save(chat: Chat, rest: str) -> Reply:
    path = _path(rest, "/save FILE")
    sessions.write(path, chat)
    return Reply(f"{len(chat.messages)} messages are in {path}; /load or --session goes on from it.")


def _load(chat: Chat, rest: str) -> Reply:
    path = _path(rest, "/load FILE")
    sessions.take_over(sessions.read(path), chat)
    return Reply(f"{len(chat.messages)} messages from {path}.", changed=True)


def _params(chat: Chat, rest: str) -> Reply:
    wishes = dict(_WISH.findall(rest))
    if _WISH.sub("", rest).strip(" ,，"):
        raise CnqError(f"{rest!r}: expected key=value, as in /params temperature=0.7 top_k=20")
    params.change(chat, wishes)
    values = ((name, params.shown(name, value)) for name, value in params.current(chat).items())
    return Reply(
        "\n".join(f"{name} = {value}".ljust(24) + params.PARAMS[name].what for name, value in values), changed=bool(wishes)
    )


def _stats(chat: Chat, rest: str) -> Reply:
    path = chat.model.path
    lines = [f"model     {path.name}, {decimal(path.stat().st_size)}", f"context   {meter(chat.used(), chat.model.n_ctx)}"]
    turns = sum(m["role"] == "user" for m in chat.messages)
    hidden = sum(m["role"] == "user" for m in chat.messages[: chat.start])
    lines.append(f"turns     {turns}" + (f", the first {hidden} no longer seen by the model" if hidden else ""))
    if last := chat.last:
        lines.append(f"prompt    {last.n_prompt} tokens, {last.n_read} of them computed for the last answer")
        lines.append(f"answer    {last.n_tokens} tokens, the first after {last.first:.2f} s, then {last.speed:.1f} tok/s")
    return Reply("\n".join(lines))


def _exit(chat: Chat, rest: str) -> Reply:
    return Reply(leave=True)


def _path(text: str, usage: str) -> Path:
    text = text.strip("\"'")
    if not text:
        raise CnqError(f"name a file: {usage}")
    return Path(text).expanduser()


COMMANDS = {
    "help": Command("", "this list", _help),
    "system": Command("[TEXT | -]", "show, set or remove what the model is told first", _system),
    "reset": Command("", "begin anew; the system text stays", _reset),
    "regen": Command("", "answer the last question again", _regen),
    "undo": Command("", "take the last question and its answer back", _undo),
    "save": Command("FILE", "write the conversation", _save),
    "load": Command("FILE", "go on with a conversation written before", _load),
    "params": Command("[KEY=VALUE …]", "show or set temperature, top_k, top_p, seed, …", _params),
    "stats": Command("", "context, tokens, speed", _stats),
    "exit": Command("", "leave", _exit),
}
