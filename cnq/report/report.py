"""What was lost and what was gained: report.json for programs, report.html for people, a model card for the hub.

A report is a function of its data: it bears no date, and the same data give the same bytes.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import OutputExists
from ..evaluate import Measured
from ..files import replacing
from ..imatrix_file import Importance, read_imatrix
from .card import card, is_ours
from .data import KLD_BOUND, Choice, Compensation, Report, Subject, choose
from .page import page

SCHEMA = 1  # of report.json; a key that goes or changes its meaning makes it 2
_CARDS = ("README.md", "MODEL_CARD.md")


@dataclass(frozen=True)
class Written:
    """card: README.md, or MODEL_CARD.md beside a README.md that cnq did not write."""

    html: Path
    json: Path
    card: Path


def write_report(report: Report, folder: Path) -> Written:
    """Write the three files into `folder`, over those of an earlier report.

    Raises GgufError (a file of the report cannot be read), OutputExists (both names of the card are taken by files that
    cnq did not write), NoSpace, CnqError.
    """
    choice = choose(report)
    importance = read_imatrix(report.imatrix) if report.imatrix else None
    written = Written(folder / "report.html", folder / "report.json", _card_path(folder))
    texts = {
        written.json: _json(report, choice, importance),
        written.html: page(report, choice, importance),
        written.card: card(report, choice),
    }
    for path, text in texts.items():
        with replacing(path, force=True) as partial:
            partial.write_text(text, encoding="utf-8", newline="\n")
    return written


def _card_path(folder: Path) -> Path:
    for name in _CARDS:
        path = folder / name
        if not path.exists():
            return path
        try:
            with path.open("rb") as f:
                if is_ours(f.read(1000).decode("utf-8", "replace")):
                    return path
        except OSError:  # a folder, or not ours to read
            continue
    raise OutputExists(f"{' and '.join(_CARDS)} in {folder} were not written by cnq and are kept. Rename one of them.")


# report.json


def _json(report: Report, choice: Choice | None, importance: Importance | None) -> str:
    content = {
        "schema": SCHEMA,
        "title": report.title,
        "source": report.source,
        "licence": report.licence,
        "languages": report.languages,
        "prompt_format": report.format,
        "advice": {"kld_bound": KLD_BOUND, "file": choice.subject.path.name, "within": choice.within} if choice else None,
        "base": _subject(report.base),
        "files": [_subject(s) for s in report.subjects],
        "evaluation": {
            "n_ctx": report.n_ctx,
            "n_chunks": report.n_chunks,
            "n_scored": report.n_scored,
            "held_out": [asdict(used) for used in report.held_out],
            "measured_on_calibration": report.measured_on_calibration,
        },
        "calibration": [asdict(used) for used in report.calibration],
        "compensation": [_compensation(c) for c in report.compensations],
        "imatrix": _imatrix(report, importance),
        "machine": asdict(report.machine),
        "versions": report.versions,
        "seconds": report.seconds,
        "commands": report.commands,
    }
    return json.dumps(_sayable(content), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _subject(s: Subject) -> dict[str, Any]:
    return {
        "file": s.path.name,
        "type": s.type,
        "imatrix": s.imatrix,
        "nbytes": s.nbytes,
        "n_params": s.file.n_params,
        "bits_per_weight": s.bits_per_weight,
        "tensor_types": {name: {"tensors": n, "nbytes": nbytes} for name, (n, nbytes) in s.tensor_types.items()},
        "measured": _measured(s.measured) if s.measured else None,
        "speed": asdict(s.speed) if s.speed else None,
        "sizing": asdict(s.sizing) | {"path": s.sizing.path.name} if s.sizing else None,
    }


def _measured(m: Measured) -> dict[str, Any]:
    """All but what stands beside it and the KLD of every single token."""
    found = {
        f.name: getattr(m, f.name) for f in fields(m) if f.name not in ("path", "nbytes", "bits_per_weight", "klds", "same")
    }
    return {name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in found.items()}


def _compensation(c: Compensation) -> dict[str, Any]:
    return {
        "file": c.path.name,
        "rounding": c.method,
        "matrices": [asdict(outcome) for outcome in c.outcomes],
        "compared_with_plain": [{"text": asdict(used), **asdict(paired)} for used, paired in c.domains],
    }


def _imatrix(report: Report, importance: Importance | None) -> dict[str, Any] | None:
    if importance is None or report.imatrix is None:
        return None
    return {
        "file": report.imatrix.name,
        "datasets": importance.datasets,
        "n_entries": len(importance.sums),
        "n_chunks": importance.n_chunks,
        "chunk_size": importance.chunk_size,
    }


def _sayable(value: Any) -> Any:
    """What JSON can say: no NaN, no infinity, no undecodable bytes of a file's name; percentiles' keys are "0.1", "50"."""
    if isinstance(value, dict):
        return {f"{k:g}" if isinstance(k, int | float) else k: _sayable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(v) for v in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
