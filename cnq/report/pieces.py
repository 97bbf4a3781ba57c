"""The small parts that a report's page is put together from."""

from collections.abc import Iterable, Sequence
from html import escape

from .data import clean


def e(text: object) -> str:
    return escape(clean(str(text)))


def both(zh: str, en: str, tag: str = "span", kind: str = "") -> str:
    """One thing in both languages; the arguments are HTML. kind: a class of STYLE."""
    kind = f' class="{kind}"' if kind else ""
    return f'<{tag}{kind} lang="zh">{zh}</{tag}> <{tag}{kind} lang="en">{en}</{tag}>'


def section(id: str, zh: str, en: str) -> str:
    return f'<h2 id="{id}">{both(zh, en)}</h2>'


def table(head: Sequence[str], rows: Iterable[str]) -> str:
    """head: the header cells' <th>. rows: <tr>s."""
    return f'<div class="scroll"><table><thead><tr>{"".join(head)}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
