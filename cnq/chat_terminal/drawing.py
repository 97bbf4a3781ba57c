"""An answer on the screen while it grows: blocks of Markdown that are finished are printed once, the last is drawn anew."""

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.segment import Segment, Segments
from rich.text import Text

from .markdown import Markdown, Prose, finished
from .painter import Painter

_WIDEST = 100  # columns; longer lines are hard to read


class Drawing:
    def __init__(self, console: Console):
        self._console = console
        self._painter = Painter(self._write, lambda: console.size)
        self._text = ""  # what is not printed for good yet
        self._begun = False

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()

    def update(self, text: str, notes: Sequence[str], status: str) -> None:
        """Draw what has come. text: what is new of the answer. notes: lines to be printed above it. status: a line below."""
        self._text += text
        cut = finished(self._text)
        done = self._spaced(self._text[:cut])
        self._begun = self._begun or bool(done)
        self._text = self._text[cut:]
        live = self._spaced(self._text)
        gap = [""] if live or self._begun else []
        below = rendered(self._console, Text(status, style="dim", no_wrap=True, overflow="ellipsis"))
        self._painter.update([*self._told(notes), *done], [*live, *gap, *below])

    def finish(self, text: str, notes: Sequence[str]) -> None:
        """Print the rest, then the notes, and an empty line."""
        lines = self._spaced(self._text + text)
        gap = [""] if lines or self._begun else []
        told = self._told(notes)
        self._painter.finish([*lines, *gap, *told, *([""] if told else [])])

    def _spaced(self, text: str) -> list[str]:
        """The lines of some blocks, and an empty one between them and those printed before."""
        lines = rendered(self._console, Markdown(text)) if text.strip() else []
        while lines and not lines[-1]:
            lines.pop()
        while lines and not lines[0]:
            lines.pop(0)
        return [""] * bool(self._begun and lines) + lines

    def _told(self, notes: Sequence[str]) -> list[str]:
        return [line for note in notes for line in rendered(self._console, Prose(note, style="yellow"))]


def rendered(console: Console, what: RenderableType) -> list[str]:
    """What a console would print, as lines with their colours, without blanks at their ends."""
    width = min(console.width, _WIDEST)
    lines = console.render_lines(what, console.options.update(width=width), pad=False)
    with console.capture() as captured:
        for line in lines:
            console.print(Segments([*_without_blanks(line), Segment.line()]), end="")
    return captured.get().split("\n")[:-1]


def _without_blanks(line: list[Segment]) -> list[Segment]:
    while line and not line[-1].text.strip() and not (line[-1].style and line[-1].style.bgcolor):
        line = line[:-1]
    if not line or (line[-1].style and line[-1].style.bgcolor):
        return line
    return [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)]
