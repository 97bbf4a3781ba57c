"""What is typed or pasted while an answer is drawn: not shown where it does not belong, but kept for the next question."""

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from prompt_toolkit.input import Input
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.output import Output


@contextmanager
def kept_typing(input: Input, output: Output) -> Iterator[Callable[[], None]]:
    """Until the block ends, keys go to the next prompt of `input`; Ctrl-C is a signal as before.

    Yields what fetches them; to be called now and then, as the system holds back few.
    """
    try:
        import termios

        fd = sys.stdin.fileno()
        mode = termios.tcgetattr(fd)
    except (ImportError, ValueError, OSError, termios.error):  # Windows; no terminal
        yield lambda: None
        return
    typed: list[bytes] = []

    def fetch() -> None:
        while select.select([fd], [], [], 0)[0] and (some := os.read(fd, 1 << 16)):
            typed.append(some)

    try:
        kept = mode[3] & ~termios.ECHO & ~termios.ICANON | termios.NOFLSH  # Ctrl-C would throw away what was typed before it
        termios.tcsetattr(fd, termios.TCSANOW, [*mode[:3], kept, *mode[4:]])
        output.enable_bracketed_paste()  # else each line of a paste would be a question of its own
        output.flush()
        yield fetch
    finally:
        with suppress(OSError, termios.error):  # the terminal is gone
            fetch()
            termios.tcsetattr(fd, termios.TCSANOW, mode)
        keys: list[KeyPress] = []
        parser = Vt100Parser(keys.append)
        parser.feed_and_flush(b"".join(typed).decode("utf-8", "surrogateescape"))
        store_typeahead(input, keys)
