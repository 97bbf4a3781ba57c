"""A conversation in a file that people can read, and its context beside it (FILE.kv): going on with it computes nothing again.

The text is written after every answer, the context at the end, which may be large. Each is complete by itself, so that one of
an earlier moment does no harm: what the context has in common with the conversation is used.
"""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import params
from .chat import Chat, open_chat
from .errors import CnqError, SessionError
from .files import locked, replacing
from .prompts import Message

_VERSION = 1


@dataclass(frozen=True)
class Saved:
    """A conversation as it was written. fingerprint: of the model's weights. format: as --format named it. start: see Chat."""

    path: Path
    model: str
    fingerprint: str
    format: str | None
    n_ctx: int
    start: int
    params: dict[str, Any]
    messages: list[Message]


def read(path: Path) -> Saved:
    """Raises SessionError for a file that cannot be read or is no conversation of cnq."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        model = said["model"]
        saved = Saved(
            path=path, model=model["file"], fingerprint=model["fingerprint"], format=said["format"], n_ctx=said["n_ctx"],
            start=said["start"], params=said["params"], messages=said["messages"],
        )  # fmt: skip
        if said["cnq_conversation"] != _VERSION or not _sound(saved):
            raise ValueError("it was written by another version, or changed by hand")
        params.checked(saved.params)
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (CnqError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise SessionError(f"{path} is no conversation of cnq, or damaged ({reason}). Name another file.") from None
    return saved


def _sound(saved: Saved) -> bool:
    roles = [m["role"] for m in saved.messages]
    return (
        all(isinstance(m["content"], str) and set(m) == {"role", "content"} for m in saved.messages)
        and set(roles[:1]) <= {"system", "user", "assistant"}
        and set(roles[1:]) <= {"user", "assistant"}
        and all(isinstance(text, str) for text in (saved.model, saved.fingerprint, saved.format or ""))
        and all(type(n) is int and n >= 0 for n in (saved.n_ctx, saved.start))
        and saved.start <= len(roles)
        and isinstance(saved.params, dict)
    )


def write(path: Path, chat: Chat) -> None:
    """Write the conversation's text; a file that is there is replaced only if it is one, too. Raises SessionError, CnqError."""
    if path.exists():
        read(path)
    said = {
        "cnq_conversation": _VERSION,
        "model": {"file": chat.model.path.name, "fingerprint": chat.model.fingerprint},
        "format": chat.format,
        "n_ctx": chat.model.n_ctx,
        "start": chat.start,
        "params": params.current(chat),
        "messages": chat.messages,
    }
    text = json.dumps(said, ensure_ascii=False, indent=1)
    with replacing(path, force=True) as partial:
        partial.write_text(text.encode("utf-8", "replace").decode() + "\n", encoding="utf-8")


def take_over(saved: Saved, chat: Chat) -> None:
    """Make the chat go on with a saved conversation, from its context if there is one; notes tell what could not be used.

    The conversation of another model is taken over as text.
    """
    params.change(chat, saved.params)
    chat.messages[:] = [dict(m) for m in saved.messages]
    chat.start = saved.start
    chat.last = None
    if saved.fingerprint != chat.model.fingerprint:
        chat.notes.append(f"{saved.path} is a conversation with another model, {saved.model}: it is read as text")
        return
    state = state_of(saved.path)
    if state.exists():
        try:
            chat.model.load_state(state)
        except CnqError as error:
            chat.notes.append(f"the conversation is computed again: {error}")


def state_of(path: Path) -> Path:
    return path.with_name(path.name + ".kv")


class Session:
    """A conversation that is kept in a file while it goes on; without a path, one that is not."""

    def __init__(self, path: Path | None, chat: Chat):
        self.path, self.chat = path, chat
        self._kept = list(chat.messages)
        self._changed = False

    def save(self) -> None:
        """Write the text, after an answer or whatever else changed it."""
        if self.path:
            write(self.path, self.chat)
            self._kept = list(self.chat.messages)
            self._changed = True

    def finish(self) -> None:
        """Write the context, if it is another than before, and the text that is not written yet."""
        if self._kept != self.chat.messages:
            self.save()
        if self.path and self._changed and self.chat.model.n_seen:
            self.chat.model.save_state(state_of(self.path))


@contextmanager
def opened(
    gguf: Path,
    path: Path | None = None,
    *,
    system: str | None = None,
    format: str | None = None,
    n_ctx: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    **options: Any,
) -> Iterator[Session]:
    """Load a GGUF and go on with the conversation in the file `path`, or begin one there; when the block ends, however it does,
    it is kept. What is not None is set anew; the rest is as it was. options: of open_chat.

    Raises SessionError: damaged, another model's, open in another cnq, or in a folder that cannot be written; what open_chat
    raises.
    """
    with ExitStack() as stack:
        saved = None
        if path:
            _lock(path, stack)
            saved = read(path) if path.exists() else None
            stack.enter_context(_ended_in_order())
        if saved:
            format, n_ctx = format or saved.format, n_ctx or saved.n_ctx
        chat = stack.enter_context(open_chat(gguf, format=format, n_ctx=n_ctx, **options))
        if saved and saved.fingerprint != chat.model.fingerprint:
            raise SessionError(
                f"{path} is a conversation with another model, {saved.model}. Name another file for --session; "
                f"in it, /load {path} takes the text over."
            )
        if saved:
            take_over(saved, chat)
        given = {"max_tokens": max_tokens, "temperature": temperature}
        params.change(chat, {name: value for name, value in given.items() if value is not None})
        if system is not None and system != chat.system:
            chat.system = system
        session = Session(path, chat)
        try:
            yield session
        finally:
            session.finish()


def _lock(path: Path, stack: ExitStack) -> None:
    try:
        stack.enter_context(locked(path, f"{path} is open in another cnq. End it there, or name another file."))
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror or error}."
        raise SessionError(f"{reason} Name a file in a folder you may write to.") from error


_ENDS = [number for name in ("SIGHUP", "SIGTERM") if (number := getattr(signal, name, None))]


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """A closed window (SIGHUP) and SIGTERM end the program as Ctrl-D does: the conversation is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _leave) for number in _ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: object) -> None:
    for end in _ENDS:
        signal.signal(end, signal.SIG_IGN)  # once: what is written from here on is not to be broken off
    sys.exit(128 + number)
