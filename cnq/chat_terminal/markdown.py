"""An answer's Markdown for a terminal: rich's renderer, made to read Chinese as it is written.

What differs from rich: lines end where Chinese lines may (wrapping.py); a line break in the source is one on the screen, as
models mean it; **重点：**接着 is bold, which CommonMark's rule for spaced languages leaves as asterisks
(https://github.com/commonmark/commonmark-spec/issues/650); HTML is shown and not dropped; headings stand on the left.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar

import rich.markdown as theirs
from markdown_it import MarkdownIt
from markdown_it.common.utils import isMdAsciiPunct, isPunctChar, isWhiteSpace
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.state_inline import Scanned
from markdown_it.token import Token
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.containers import Lines
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from .wrapping import breaks, is_wide, printable


def finished(text: str) -> int:
    """How many characters of a growing answer are blocks that what follows cannot change: all but the last block.

    A last line that is not whole yet decides nothing: "#" may become a heading or a word.
    """
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    starts = [
        token.map[0] for token in _parser().parse("".join(lines)) if token.level == 0 and token.map and token.nesting >= 0
    ]
    return sum(map(len, lines[: starts[-1]])) if len(starts) > 1 else 0


class Prose(Text):
    """Text whose lines end where mixed Chinese and Latin text may."""

    def wrap(self, console: Console, width: int, **how: Any) -> Lines:
        lines = Lines()
        for line in self.split(allow_blank=True):
            line.expand_tabs(how.get("tab_size") or 8)
            for part in line.divide(breaks(line.plain, width)):
                part.rstrip()
                lines.extend(Text.wrap(part, console, width, **how))
        return lines


class _Paragraph(theirs.Paragraph):
    def on_enter(self, context: theirs.MarkdownContext) -> None:
        super().on_enter(context)
        self.text = Prose(justify="left")


class _Heading(theirs.Heading):
    def on_enter(self, context: theirs.MarkdownContext) -> None:
        super().on_enter(context)
        self.text = Prose()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Cell(theirs.TableDataElement):
    def __init__(self, justify: theirs.JustifyMethod) -> None:
        super().__init__(justify)
        self.content = Prose("", justify=justify)


class _Table(theirs.TableElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, style="markdown.table.border")
        for column in self.header.row.cells if self.header and self.header.row else ():
            table.add_column(column.content, header_style="markdown.table.header", overflow="fold")
        for row in self.body.rows if self.body else ():
            table.add_row(*(cell.content for cell in row.cells))
        yield table


class _Code(theirs.CodeBlock):
    """Indented, and in the terminal's own colours: what is copied from it is the code."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = Syntax(str(self.text).rstrip(), self.lexer_name, theme="ansi_dark", word_wrap=True, background_color="default")
        yield Padding(code, (0, 0, 0, 2))


class Markdown(theirs.Markdown):
    """An answer, or some blocks of one, to be printed by a rich console."""

    elements: ClassVar[dict[str, type[theirs.MarkdownElement]]] = {
        **theirs.Markdown.elements,
        "paragraph_open": _Paragraph, "heading_open": _Heading, "fence": _Code, "code_block": _Code,
        "table_open": _Table, "td_open": _Cell, "th_open": _Cell,
    }  # fmt: skip

    def __init__(self, text: str):
        super().__init__("", hyperlinks=False)
        self.markup = text
        self.parsed = _parser().parse(printable(text))
        for token in _inside(self.parsed):
            if token.type == "softbreak":
                token.type = "hardbreak"


def _inside(tokens: Iterable[Token]) -> Iterable[Token]:
    for token in tokens:
        yield token
        yield from _inside(token.children or ())


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt()
    parser.inline = _Inline()
    return parser.configure("commonmark", {"html": False}).enable(["strikethrough", "table"])


class _Inline(ParserInline):
    def parse(self, src: str, md: MarkdownIt, env: Any, tokens: list[Token]) -> list[Token]:
        state = _State(src, md, env, tokens)
        self.tokenize(state)
        for rule in self.ruler2.getRules(""):
            rule(state)
        return state.tokens


class _State(StateInline):
    def scanDelims(self, start: int, canSplitWord: bool) -> Scanned:
        """CommonMark's rule for what opens and closes emphasis, where a Chinese neighbour counts as a word's end."""
        marker, end = self.src[start], start
        while end < self.posMax and self.src[end] == marker:
            end += 1
        last = self.src[start - 1] if start else " "
        following = self.src[end] if end < self.posMax else " "

        def ends(char: str) -> bool:
            return isWhiteSpace(ord(char)) or punctuation(char) or is_wide(char)

        def punctuation(char: str) -> bool:
            return isMdAsciiPunct(ord(char)) or isPunctChar(char)

        left = not isWhiteSpace(ord(following)) and (not punctuation(following) or ends(last))
        right = not isWhiteSpace(ord(last)) and (not punctuation(last) or ends(following))
        can_open = left and (canSplitWord or not right or punctuation(last))
        can_close = right and (canSplitWord or not left or punctuation(following))
        return Scanned(can_open, can_close, end - start)
