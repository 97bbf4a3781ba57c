"""What a report is made from, which file it advises, and how its figures are written."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..allocate.gate import Contender
from ..corpus import Used
from ..engine.quantizer import Outcome
from ..evaluate import Measured
from ..gguf_file import GgufFile
from ..machine import Machine
from ..paired import Paired
from ..scores import Estimate
from ..speed import Speed

# Nats. In llama.cpp's table for Llama 3 8B (tools/perplexity/README.md, revision f364eb6f) every mixture of K-quants with
# 4 bits lies below it (Q4_K_S without imatrix: 0.043), every one with 3 bits above (Q3_K_L with imatrix: 0.073).
KLD_BOUND = 0.05
NONE = "–"
ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_MATRIX = re.compile(r"blk\.(\d{1,6})\.(.+)\.weight")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Subject:
    """One GGUF of the report. type: e.g. "Q4_K_M". imatrix: whether one weighed the rounding. measured, speed: None = not.

    sizing: how it was made to fit a size; None: it has the types of llama.cpp's mixture.
    """

    path: Path
    type: str
    imatrix: bool
    measured: Measured | None
    speed: Speed | None
    sizing: "Sizing | None" = None

    @cached_property
    def file(self) -> GgufFile:
        """Its metadata, read when first asked for. Raises GgufError."""
        return GgufFile(self.path)

    @cached_property
    def nbytes(self) -> int:
        return self.measured.nbytes if self.measured else self.path.stat().st_size

    @property
    def bits_per_weight(self) -> float:
        return self.measured.bits_per_weight if self.measured else self.file.bits_per_weight

    @property
    def kld(self) -> Estimate | None:
        return self.measured.against.kld if self.measured and self.measured.against else None

    @property
    def label(self) -> str:
        return clean(self.type) + ("-im" if self.imatrix else "")

    @cached_property
    def tensor_types(self) -> dict[str, tuple[int, int]]:
        """Tensor type -> (tensors, bytes), the most bytes first."""
        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for t in self.file.tensors.values():
            count[t.type.name] += 1
            size[t.type.name] += t.nbytes
        return {name: (count[name], nbytes) for name, nbytes in size.most_common()}


@dataclass(frozen=True)
class Sizing:
    """A file made to fit a size. kept: "allocation", or the stock mixture that was better on the held-out text.

    budget: bytes. predicted: KLD by the model of sensitivities. gap: to the least that can be predicted, relative. ends: share
    of embedding and output in the bytes. contenders: the files that were measured, compared: the allocation against the stock
    mixture nearest in size, rounded plainly; None = not measured.
    """

    path: Path
    kept: str
    budget: int
    predicted: float
    gap: float
    ends: float
    contenders: tuple[Contender, ...]
    compared: Paired | None
    held_out: tuple[Used, ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Compensation:
    """A file that was rounded with compensation. outcomes: of its matrices. domains: texts unlike the calibration's, and how
    the file compares on them with plain rounding to the same types. method: compensated or sequential."""

    path: Path
    outcomes: tuple[Outcome, ...]
    domains: tuple[tuple[Used, Paired], ...]
    method: str = "compensated"

    @property
    def tried(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.loss is not None and o.loss_plain]

    def losses(self) -> dict[str, dict[int, tuple[float, float]]]:
        """Role -> layer -> (plain, compensated) mean square of the error at the output, experts added up."""
        found: dict[str, dict[int, tuple[float, float]]] = {}
        for o in self.tried:
            if m := _MATRIX.fullmatch(o.name):
                layers = found.setdefault(m[2], {})
                plain, mine = layers.get(int(m[1]), (0.0, 0.0))
                layers[int(m[1])] = plain + (o.loss_plain or 0.0), mine + (o.loss or 0.0)
        return found


@dataclass(frozen=True)
class Report:
    """base: the float GGUF that the subjects were made from. n_ctx, n_chunks, n_scored, held_out: of the evaluation
    (cnq.evaluate.Evaluation). calibration: of the imatrix, empty without one. format: of the prompt. licence, source (a hub
    id, or where the model is from), languages (ISO 639-1): None or empty = unknown. versions: package -> version.
    seconds: step -> how long it took; steps that were skipped are left out. commands: what was typed, in order.
    """

    title: str
    base: Subject
    subjects: tuple[Subject, ...]
    n_ctx: int
    n_chunks: int
    n_scored: int
    held_out: tuple[Used, ...]
    calibration: tuple[Used, ...]
    imatrix: Path | None
    format: str | None
    licence: str | None
    source: str | None
    versions: dict[str, str]
    machine: Machine
    seconds: dict[str, float]
    commands: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    compensations: tuple[Compensation, ...] = ()

    @property
    def by_size(self) -> list[Subject]:
        return sorted(self.subjects, key=lambda s: s.nbytes)

    @property
    def hub_id(self) -> str | None:
        return self.source if self.source and _HUB_ID.fullmatch(self.source) else None

    @property
    def measured_on_calibration(self) -> list[str]:
        """Names of texts that the quality was measured on although the imatrix was computed from them: flattering."""
        seen = {(used.sha256, used.split) for used in self.calibration}
        return [used.name for used in self.held_out if (used.sha256, used.split) in seen]


@dataclass(frozen=True)
class Choice:
    """The file to take. within: whether it keeps KLD_BOUND; else it is merely the closest to the base."""

    subject: Subject
    kld: Estimate
    within: bool


def choose(report: Report) -> Choice | None:
    """The smallest file whose mean KLD is at most KLD_BOUND, twice its standard error included; else that of the least KLD.

    None when no KLD was measured.
    """
    known = [(s, s.kld) for s in report.by_size if s.kld and math.isfinite(s.kld.value)]
    for subject, kld in known:
        if kld.value + 2 * kld.error <= KLD_BOUND:
            return Choice(subject, kld, True)
    return Choice(*min(known, key=lambda pair: pair[1].value), False) if known else None


# Figures


def clean(text: str) -> str:
    """Text for one line: names from a hostile file may hold line breaks or escape sequences."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits, never in exponents."""
    if value is None or not math.isfinite(value):
        return NONE
    if not value:
        return "0"
    return f"{value:.{min(9, max(0, digits - 1 - math.floor(math.log10(abs(value)))))}f}"


def with_error(estimate: Estimate | None) -> str:
    """ "0.0313 ± 0.0024": two digits of the error, and as many places of the value."""
    if estimate is None or not math.isfinite(estimate.value):
        return NONE
    if not math.isfinite(estimate.error) or estimate.error <= 0:
        return number(estimate.value, 4)
    places = min(9, max(0, 1 - math.floor(math.log10(estimate.error))))
    return f"{estimate.value:.{places}f} ± {estimate.error:.{places}f}"
