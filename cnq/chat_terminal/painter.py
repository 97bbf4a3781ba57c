"""The end of the screen that still changes. Only lines that differ are written again, in one go: nothing flickers.

Escape sequences: ECMA-48 (cursor, erase) and DEC's private modes 7 (line wrap) and 25 (cursor), which all terminals know.
"""

import re
from collections.abc import Callable, Sequence

from .wrapping import cell_width

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Painter:
    """Lines at the cursor: those that are done scroll away for good, the live ones are drawn over the next time."""

    def __init__(self, write: Callable[[str], object], size: Callable[[], tuple[int, int]]):
        """write: text to the terminal. size: its columns and rows now."""
        self._write, self._size = write, size
        self._shown = [""]  # the cursor is at the end of the last
        self._columns = size()[0]

    def update(self, done: Sequence[str], live: Sequence[str]) -> None:
        """Draw lines, which may have colours, over the live ones of the last time. No line may be wider than the screen."""
        columns, rows = self._size()
        live = list(live[-max(1, rows - 1) :]) or [""]  # the cursor cannot go above the first row
        lines, shown = [*done, *live], self._shown
        self._shown = live
        same, up = _in_common(lines, shown), len(shown) - 1
        if columns != self._columns:  # the terminal has put its lines anew
            up = min(rows - 1, sum(_rows(line, columns) for line in shown) - 1)
            same, self._columns = 0, columns
        elif same == len(lines) == len(shown):
            return
        if same == len(shown):
            out = "\r\n"
        else:
            same = min(same, len(lines) - 1)
            out = "\r" + (f"\x1b[{up - same}A" if up > same else "") + "\x1b[J"
        for i in range(same, len(lines)):
            # A live line must stay one row, also where the terminal takes a character for wider than we do.
            out += f"\x1b[?7{'h' if i < len(done) else 'l'}{lines[i]}\x1b[0m" + ("\r\n" if i + 1 < len(lines) else "")
        self._write(f"\x1b[?25l{out}\x1b[?7h")

    def finish(self, done: Sequence[str]) -> None:
        """Draw the last lines and leave the cursor below them."""
        self.update(done, [])
        self._write("\x1b[?25h")


def _in_common(lines: Sequence[str], shown: Sequence[str]) -> int:
    """How many first lines are the same."""
    return next((i for i, (a, b) in enumerate(zip(lines, shown, strict=False)) if a != b), min(len(lines), len(shown)))


def _rows(line: str, columns: int) -> int:
    return max(1, -(-cell_width(_ESCAPES.sub("", line)) // columns))
