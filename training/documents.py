"""Documents of text files, read piece by piece, and which of them are held out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from cnq import records
from cnq.errors import CorpusError, listed

from .held_out import position, threshold

Kind = Literal["line", "paragraph", "file"]


@dataclass(frozen=True)
class Corpus:
    """threshold: documents whose position lies below it are held out."""

    files: tuple[Path, ...]
    kind: Kind
    seed: int
    threshold: float

    def texts(self, *, held_out: bool) -> Iterator[str]:
        for text in _documents(self.files, self.kind):
            if (position(text, self.seed) < self.threshold) == held_out:
                yield text


@dataclass(frozen=True)
class Survey:
    """documents, nbytes: of UTF-8, without those held out."""

    documents: int
    nbytes: int
    held_out_documents: int
    threshold: float


def survey(files: Sequence[Path], kind: Kind, share: float, seed: int) -> Survey:
    """Read everything. threshold is `share`, or more where that would hold out nothing.

    Raises CorpusError: no text, no UTF-8, or nothing is left to train on.
    """
    limit = threshold(lambda: (position(text, seed) for text in _documents(files, kind)), share)
    n = nbytes = n_held_out = 0
    for text in _documents(files, kind):
        if position(text, seed) < limit:
            n_held_out += 1
        else:
            n, nbytes = n + 1, nbytes + len(text.encode())
    if not n + n_held_out:
        raise CorpusError(f"there is no text in {listed(str(f) for f in files)}.")
    if not n:
        raise CorpusError(
            f"of {n_held_out} documents all would be held out, and none be left to train on. Give more text, make every line a "
            "document (documents=line), or hold out nothing (held_out=0)."
        )
    return Survey(n, nbytes, n_held_out, limit)


def _documents(files: Iterable[Path], kind: Kind) -> Iterator[str]:
    for file in files:
        if kind == "file":
            texts: Iterable[str] = ["\n".join(records.lines(file))]
        elif kind == "line":
            texts = records.lines(file)
        else:
            texts = ("\n".join(part) for _, part in groupby(records.lines(file), key=lambda line: bool(line.strip())))
        yield from (text for text in texts if text.strip())
