"""Where a question is typed: history, several lines, pasted text as one message, commands completed."""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_searching
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.styles import Style

from ..errors import CnqError
from ..files import user_dir
from ..params import PARAMS
from .commands import COMMANDS
from .typeahead import kept_typing

_STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"})
_QUOTED = re.compile(r'\s*"""\n?(.*?)\n?"""\s*', re.DOTALL)
_LONG = 4000  # characters of a paste that are not drawn but named


def is_open(text: str) -> bool:
    """Whether triple quotes at the beginning are not closed yet: Enter then begins a new line."""
    return text.lstrip().startswith('"""') and text.count('"""') == 1


def message(text: str) -> str:
    """What was typed, without triple quotes around it. Quotes within belong to the text, which may be a program."""
    match = _QUOTED.fullmatch(text)
    return match[1] if match and text.count('"""') == 2 else text


class Editor:
    """Reads questions from the terminal. note: why the history is not kept, if it is not."""

    def __init__(self, toolbar: Callable[[], str]):
        self._pasted: dict[str, str] = {}
        history = _History(self._pasted)
        self.note = history.note
        self._session: PromptSession[str] = PromptSession(
            message=[("class:prompt", ">>> ")],
            prompt_continuation=_continuation,
            multiline=True,
            history=history,
            auto_suggest=AutoSuggestFromHistory(),
            completer=CommandCompleter(),
            complete_while_typing=True,
            bottom_toolbar=toolbar,
            key_bindings=_keys(self._pasted),
            style=_STYLE,
        )

    def read(self) -> str:
        """The next message. Raises KeyboardInterrupt (Ctrl-C; with text, it is only cleared), EOFError (Ctrl-D)."""
        text = self._session.prompt()
        for mark, pasted in self._pasted.items():
            text = text.replace(mark, pasted)
        return message(text).encode("utf-8", "replace").decode()

    def kept_typing(self) -> AbstractContextManager[Callable[[], None]]:
        """See typeahead.py."""
        return kept_typing(self._session.input, self._session.output)


class PlainEditor:
    """For a terminal that cannot move its cursor (TERM=dumb): a line at a time, as the system edits it."""

    note = ""

    def read(self) -> str:
        return input(">>> ")

    def kept_typing(self) -> AbstractContextManager[Callable[[], None]]:
        return nullcontext(lambda: None)


class _History(FileHistory):
    """The questions of this and earlier chats, in a file that only the user can read; what was pasted at length is left out.

    note: why nothing is kept, if so. A disk that is full later does not end the chat.
    """

    def __init__(self, pasted: dict[str, str]):
        self._pasted, self.note = pasted, ""
        try:
            path = user_dir("state") / "chat_history"
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            with path.open("ab"):
                super().__init__(path)
        except (OSError, CnqError) as error:
            super().__init__(os.devnull)
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
            self.note = f"questions are not remembered: {reason}"

    def append_string(self, string: str) -> None:
        if not any(mark in string for mark in self._pasted):
            super().append_string(string)

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string.encode("utf-8", "replace").decode())


def _continuation(width: int, line_number: int, wrap_count: int) -> StyleAndTextTuples:
    return [("class:prompt", "" if wrap_count else "... ".rjust(width))]


def _keys(pasted: dict[str, str]) -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None
        elif buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=~is_searching)
    def ctrl_c(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @keys.add(Keys.BracketedPaste)
    def paste(event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        if len(text) > _LONG:
            mark = f"[pasted text {len(pasted) + 1}: {len(text)} characters in {len(text.splitlines())} lines]"
            pasted[mark] = text
            text = mark
        event.current_buffer.insert_text(text)

    return keys


class CommandCompleter(Completer):
    """Commands after a slash; then files, or the names of parameters."""

    _files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            for known, command in COMMANDS.items():
                if known.startswith(name[1:]):
                    yield Completion("/" + known, -len(name), display_meta=command.what)
        elif name in ("/save", "/load"):
            yield from self._files.get_completions(Document(rest), complete_event)
        elif name == "/params":
            word = rest.rpartition(" ")[2]
            for key, param in PARAMS.items():
                if key.startswith(word):
                    yield Completion(key + "=", -len(word), display_meta=param.what)
