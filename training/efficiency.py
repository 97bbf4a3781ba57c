"""How many tokens a text takes before and after, Chinese and English apart."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from sentencepiece import SentencePieceProcessor

from cnq.corpus import Source

from .pieces import Model

_HAN, _LATIN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"), re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Rate:
    """bytes_per_token: of UTF-8. tokens_per_character: Unicode code points."""

    tokens: int
    bytes_per_token: float
    tokens_per_character: float


@dataclass(frozen=True)
class Efficiency:
    """Of all passages in one language."""

    language: str
    nbytes: int
    characters: int
    before: Rate
    after: Rate


def english() -> Source:
    """The default English text: Python's own language reference, as far as `help` shows it; it differs between versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        documents: tuple[str, ...] = ()
    else:
        documents = tuple(topics[name] for name in sorted(topics))
    return Source("Python's language reference", hashlib.sha256("".join(documents).encode()).hexdigest(), documents)


def efficiency(sources: Sequence[Source], before: Model, after: Model) -> list[Efficiency]:
    """Tokens of the sources' passages, by language."""
    encoders = [SentencePieceProcessor(model_proto=m.SerializeToString()) for m in (before, after)]
    passages: dict[str, list[str]] = {}
    for source in sources:
        for document in source.documents:
            for language, passage in _passages(document):
                passages.setdefault(language, []).append(passage)
    return [_measured(language, passages[language], encoders) for language in sorted(passages)]


def _measured(language: str, passages: list[str], encoders: list[SentencePieceProcessor]) -> Efficiency:
    nbytes, characters = sum(len(p.encode()) for p in passages), sum(map(len, passages))
    counts = [sum(map(len, encoder.encode(passages))) for encoder in encoders]
    before, after = (Rate(n, round(nbytes / n, 4), round(n / characters, 4)) for n in counts)
    return Efficiency(language, nbytes, characters, before, after)


def _passages(document: str) -> Iterator[tuple[str, str]]:
    """Lines that follow each other in one language; a line without letters goes with the one before it."""
    language = ""
    labelled = []
    for line in document.splitlines(keepends=True):
        language = _language(line) or language
        labelled.append((language, line))
    for found, lines in groupby(labelled, key=lambda pair: pair[0]):
        if found:
            yield found, "".join(line for _, line in lines)


def _language(line: str) -> str:
    """A character of Chinese weighs as much as a word of four letters."""
    han, latin = len(_HAN.findall(line)), len(_LATIN.findall(line))
    return "Chinese" if 4 * han > latin else "English" if latin else ""
