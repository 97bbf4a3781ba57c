"""A build's files that are made to fit a size, as steps that are not done twice."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from .allocate import measure
from .allocate.gate import Contender, HeldOut, quantize_to_size
from .allocate.measure import Text
from .allocate.search import Budget
from .corpus import Used
from .hessian_file import beside, manifest_path
from .paired import Interval, Paired
from .quantize import plans
from .report import Sizing
from .steps import Done, named, step

FRONTIER = ("Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M")  # mixtures whose sizes a frontier is made of


class Progress(measure.Progress, Protocol):
    """What a build tells while it works. bar: gives a function of (done, total) in `unit`, "bytes" or "tensors"."""

    def skipped(self, path: Path) -> None: ...


@dataclass(frozen=True)
class Fitting:
    """How files are made. text: sensitivities are measured on it. held_out: they are judged on, `judged` chunks; None = not."""

    imatrix: Path | None
    text: Text
    rounding: str
    effort: str
    held_out: HeldOut | None
    judged: int


def frontier_sizes(src: Path, imatrix: Path | None, rounding: str) -> list[Budget]:
    found = plans(src, FRONTIER, imatrix=imatrix, rounding=rounding if imatrix else "plain")
    return [Budget(p.nbytes) for p in found]


def name_of(budget: Budget) -> str:
    return f"{budget.nbytes / 1e6:.0f}MB" if budget.nbytes else f"{budget.bits:g}bpw"


def fit(
    src: Path, dst: Path, budget: Budget, how: Fitting, threads: int, progress: Progress
) -> tuple[float | None, Done, Sizing]:
    """Make `dst` unless it is up to date: (seconds, its step's record, how it was made); seconds None = it was there."""

    def work() -> Done:
        found = quantize_to_size(
            src,
            dst,
            budget,
            how.text,
            how.held_out,
            imatrix=how.imatrix,
            rounding=how.rounding,
            effort=how.effort,
            threads=threads,
            force=True,
            progress=progress,
        )
        a = found.allocation
        facts: dict[str, Any] = {"kept": found.kept, "budget": a.budget, "predicted": a.predicted, "gap": a.gap}
        facts |= {
            "ends": a.ends[0],
            "contenders": [asdict(c) for c in found.contenders],
            "compared": asdict(found.compared) if found.compared else None,
            "held_out": [asdict(u) for u in found.held_out],
            "seconds": found.seconds,
        }
        return Done(found.notes, facts)

    inputs = named(src, how.imatrix) if how.imatrix else named(src)
    if how.imatrix and how.rounding != "plain":
        inputs |= {"second moments": manifest_path(beside(how.imatrix))}
    options = {"budget": asdict(budget), "rounding": how.rounding, "effort": how.effort, "judged": how.judged}
    seconds, done = step(dst, inputs, options, work, progress.skipped)
    return seconds, done, _sizing(dst, done.facts)


def _sizing(path: Path, facts: dict[str, Any]) -> Sizing:
    compared = facts["compared"]
    if compared:
        compared = Paired(**compared | {key: Interval(**compared[key]) for key in ("kld", "median", "top")})
    read: dict[str, Callable[[Any], Any]] = {
        "contenders": lambda found: tuple(Contender(**c) for c in found),
        "held_out": lambda found: tuple(Used(**u) for u in found),
    }
    kept = {key: read[key](value) if key in read else value for key, value in facts.items()}
    return Sizing(path=path, **kept | {"compared": compared})
