"""What may be written to a terminal, in which portions, and where a line of mixed Chinese and Latin text may end.

Latin words stay whole; between Chinese characters a line may end anywhere, but it does not begin with closing punctuation,
nor end with an opening bracket (Requirements for Chinese Text Layout, W3C clreq, section 3.1.3). Widths are those of
wcwidth, in whole grapheme clusters: an emoji of several characters, or a letter and its accents, is one thing.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

from wcwidth import iter_graphemes, wcswidth
from wcwidth import width as text_width

_NOT_FIRST = frozenset("，。、；：？！·…—～％‰℃!?,.;:%’”々ー〜ぁぃぅぇぉっゃゅょァィゥェォッャュョ")
_NOT_LAST = frozenset("￥＄£＃‘“")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LONGEST = 64  # characters of a cluster that is waited for; flags of regions have 7, families 11


def breaks(text: str, width: int) -> list[int]:
    """Where to divide `text`, which has no line breaks in it, so that no part is wider than `width` cells.

    Spaces at the end of a part do not count. A word wider than a line is divided between clusters.
    """
    found: list[int] = []
    used = 0  # cells since the last break
    at, before = 0, " "
    allowed, used_there = 0, 0  # the last place where the line may end, and the cells up to it
    for cluster in iter_graphemes(text):
        cells = cell_width(cluster)
        if may_break(before, cluster):
            allowed, used_there = at, used
        while used + cells > width and used and not cluster.isspace():
            start = found[-1] if found else 0
            if allowed > start:
                found.append(allowed)
                used -= used_there
            else:
                found.append(at)
                used = 0
            allowed, used_there = found[-1], 0
        used += cells
        at += len(cluster)
        before = cluster
    return found


def may_break(before: str, after: str) -> bool:
    """Whether a line may end between two clusters."""
    if after.isspace():
        return False
    if before.isspace():
        return True
    if after[0] in _NOT_FIRST or before[-1] in _NOT_LAST:
        return False
    if unicodedata.category(after[0]) in ("Pe", "Pf") or unicodedata.category(before[0]) in ("Ps", "Pi"):
        return False
    return is_wide(before) or is_wide(after)


def is_wide(cluster: str) -> bool:
    return cell_width(cluster) > 1


def cell_width(text: str) -> int:
    """Cells of a terminal that a text without control characters takes."""
    cells = wcswidth(text)
    return cells if cells >= 0 else text_width(text, control_codes="ignore")


def printable(text: str) -> str:
    """Text without control characters but line breaks and tabs: an answer must not move the cursor or rename the window."""
    return _CONTROLS.sub("", text)


def clusters(pieces: Iterable[str]) -> Iterator[str]:
    """A stream in whole grapheme clusters: a string, perhaps empty, for each piece, then the rest.

    The last cluster is held back until the next one begins: 👨 may become 👨‍👩‍👧, and e may become é.
    """
    held = ""
    for piece in pieces:
        *whole, held = list(iter_graphemes(held + piece)) or [""]
        if len(held) > _LONGEST:
            whole, held = [*whole, held], ""
        yield "".join(whole)
    yield held
