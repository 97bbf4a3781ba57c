"""A file of a given size: allocated, made, measured on held-out text beside the stock mixture, and the better one kept."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..corpus import Chunks, Used
from ..engine.model import Model
from ..errors import OutputExists
from ..evaluate import Measured, evaluate
from ..files import replacing, sha256
from ..gguf_file import GgufFile
from ..paired import Paired, compare
from ..quantize import anchored, plans, quantize
from .candidates import beside
from .measure import N_CTX, Progress, Text
from .recipe import ENDING, TYPES_ENDING, Recipe, write_recipe
from .search import STOCK, Allocation, Budget, allocate

HeldOut = Callable[[Model], Chunks]


@dataclass(frozen=True)
class Contender:
    """One file of the gate. name: "allocation", or the stock mixture's. fits: whether the budget holds it. kept: the result.

    kld, error, median: nats; top: percent. None when nothing was measured.
    """

    name: str
    rounding: str
    nbytes: int
    fits: bool
    kept: bool
    kld: float | None
    error: float | None
    median: float | None
    top: float | None


@dataclass(frozen=True)
class Sized:
    """path: the result. recipe, tensor_types: what makes it again; None when a stock mixture was kept.

    compared: the allocation against the stock mixture nearest in size with plain rounding, on the held-out text.
    """

    path: Path
    kept: str
    nbytes: int
    allocation: Allocation
    contenders: tuple[Contender, ...]
    compared: Paired | None
    held_out: tuple[Used, ...]
    recipe: Path | None
    tensor_types: Path | None
    notes: tuple[str, ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class _File:
    name: str
    rounding: str
    path: Path


def quantize_to_size(
    src: Path,
    dst: Path,
    budget: Budget,
    text: Text,
    held_out: HeldOut | None,
    *,
    imatrix: Path | None = None,
    rounding: str | None = None,
    types: Sequence[str] = (),
    tensor_types: Sequence[tuple[str, str]] = (),
    effort: str = "normal",
    repacked: frozenset[str] | None = None,
    threads: int = 0,
    force: bool = False,
    progress: Progress,
) -> Sized:
    """Quantize the float GGUF `src` into `dst`, of at most the budget.

    text: to measure sensitivities on. held_out: to judge by; None = the allocation is taken on trust. The other arguments are
    allocate's and quantize's. Beside `dst` comes its recipe.
    """
    if dst.exists() and not force:
        raise OutputExists(f"{dst} exists. Add --force to replace it, or name another output.")
    found = allocate(
        src, budget, text, imatrix=imatrix, rounding=rounding, types=types, tensor_types=tensor_types, effort=effort,
        repacked=repacked, threads=threads, progress=progress,
    )  # fmt: skip
    dst.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".cnq-", dir=dst.parent) as scratch:
        with progress.bar("quantizing", "files") as tick:
            files = _made(src, Path(scratch), found, imatrix, threads, bool(held_out), tick)
        made = time.perf_counter()
        contenders, compared, used = _judged(src, files, found, held_out, threads, progress)
        kept = next(i for i, c in enumerate(contenders) if c.kept)
        with replacing(dst, force=force) as partial:
            files[kept].path.rename(partial)
    seconds = found.seconds | {"quantizing": made - started, "measuring": time.perf_counter() - made}
    recipe = types_file = None
    if kept == 0:
        recipe, types_file = beside(dst, ENDING), beside(dst, TYPES_ENDING)
        write_recipe(_recipe(src, dst, found, imatrix), recipe, types_file)
    winner = contenders[kept]
    return Sized(
        path=dst,
        kept=winner.name,
        nbytes=dst.stat().st_size,
        allocation=replace(found, notes=()),
        contenders=tuple(contenders),
        compared=compared,
        held_out=used,
        recipe=recipe,
        tensor_types=types_file,
        notes=(*found.notes, *_notes(winner, found, compared)),
        seconds=seconds,
    )


def _made(
    src: Path,
    folder: Path,
    found: Allocation,
    imatrix: Path | None,
    threads: int,
    judged: bool,
    tick: Callable[[int, int], object],
) -> list[_File]:
    """The allocation, and what it is compared with: the stock mixture nearest in size, and the nearest that fits the budget."""
    wanted = [("allocation", found.rounding)]
    if judged:
        sizes = {p.type: p.nbytes for p in plans(src, STOCK, imatrix=imatrix, rounding=found.rounding)}
        fitting = [t for t in sizes if sizes[t] <= found.budget]
        near = [found.type, *([max(fitting, key=lambda t: sizes[t])] if fitting else [])]
        # Sequential rounding is for the one file that is meant to stay: it runs the text again for each.
        roundings = dict.fromkeys(["plain", "compensated" if found.rounding == "sequential" else found.rounding])
        wanted += [(type, rounding) for type in dict.fromkeys(near) for rounding in roundings]
    files = []
    for i, (name, rounding) in enumerate(wanted):
        path = folder / f"{i}.gguf"
        type, own = (found.type, anchored(found.types)) if name == "allocation" else (name, [])
        quantize(src, path, type, imatrix=imatrix, tensor_types=own, rounding=rounding, threads=threads)
        files.append(_File(name, rounding, path))
        tick(i + 1, len(wanted))
    return files


def _judged(
    src: Path, files: list[_File], found: Allocation, held_out: HeldOut | None, threads: int, progress: Progress
) -> tuple[list[Contender], Paired | None, tuple[Used, ...]]:
    if not held_out:
        (only,) = files
        size = only.path.stat().st_size
        return [Contender(only.name, only.rounding, size, True, True, None, None, None, None)], None, ()
    with progress.bar("measuring on held-out text", "chunks") as tick:
        result = evaluate([f.path for f in files], held_out, base=src, n_ctx=N_CTX, threads=threads, progress=tick)
    klds = [_kld(m) for m in result.models]
    fits = [f.path.stat().st_size <= found.budget for f in files]
    best = min((i for i in range(len(files)) if fits[i]), key=lambda i: klds[i])
    contenders = [
        Contender(f.name, f.rounding, m.nbytes, fits[i], i == best, m.against.kld.value, m.against.kld.error,
                  m.against.kld_percentiles[50], m.against.same_top.value)
        for i, (f, m) in enumerate(zip(files, result.models, strict=True))
        if m.against
    ]  # fmt: skip
    return contenders, compare(result.models[1], result.models[0], result.n_chunks), result.manifest


def _kld(measured: Measured) -> float:
    assert measured.against
    return measured.against.kld.value


def _recipe(src: Path, dst: Path, found: Allocation, imatrix: Path | None) -> Recipe:
    name = GgufFile(src).fields.get("general.name")
    return Recipe(
        model=name if isinstance(name, str) else src.stem,
        type=found.type,
        rounding=found.rounding,
        nbytes=found.nbytes,
        types=found.types,
        imatrix=imatrix.name if imatrix else None,
        imatrix_sha256=sha256(imatrix) if imatrix else None,
        sha256=sha256(dst),
    )


def _notes(winner: Contender, found: Allocation, compared: Paired | None) -> list[str]:
    if winner.name != "allocation":
        return [f"the allocation lost more on held-out text than {winner.name}, rounding {winner.rounding}, which was kept"]
    if compared and compared.kld.high >= 1:
        return [f"on this text the allocation is not surely better than {found.type}: the interval of the ratio reaches 1"]
    return []
