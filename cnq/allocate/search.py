"""From a budget to a type for each tensor: sensitivities, the knapsack, and bytes checked against llama.cpp's dry run."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.child import Child
from ..engine.quantizer import DAMPING, ORDERS
from ..errors import EngineError, QuantizeError
from ..files import sha256
from ..fingerprint import fingerprint
from ..gguf_file import TYPE_BY_NAME, GgufFile
from ..hessian_file import Statistics
from ..imatrix_file import read_imatrix
from ..machine import physical_cores
from ..quantize import Plan, anchored, plan, plans, rounding_by, statistics_for
from . import knapsack
from .candidates import Space, allowed_types, fixed, space
from .groups import Part
from .measure import EFFORTS, Progress, Sensitivities, Subject, Text, measure
from .rounding import Compensating, Plain

STOCK = ("Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_S", "IQ3_M", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S",
         "Q5_K_M", "Q6_K", "Q8_0")  # fmt: skip
_FILLED = 0.995  # of the budget, at least, when the types allow it
_SLOWER = 1.25  # how much more a type that is not repacked is taken to lose, where speed counts


@dataclass(frozen=True)
class Budget:
    """nbytes: of the whole file, at most; or bits: per weight, of the tensors' data. clipped: more than can be used is fine."""

    nbytes: int | None = None
    bits: float | None = None
    clipped: bool = False

    def of(self, file: GgufFile, rest: int) -> int:
        """Bytes. rest: of the file besides its matrices."""
        if self.nbytes is not None:
            return self.nbytes
        vectors = sum(t.nbytes for t in file.tensors.values() if len(t.shape) < 2)
        return int((self.bits or 0) * file.n_params / 8) + max(0, rest - vectors)


@dataclass(frozen=True)
class Allocation:
    """type: the stock mixture nearest in size, which stands in the file's metadata. types: of every tensor that is quantized.

    predicted, predicted_stock: KLD by the model of sensitivities, here and of that mixture rounded alike (None = it has types
    that were not measured). gap: how far from the
    optimum of that model it can be. ends, ends_stock: the share of embedding and output in the bytes of the matrices, and in
    the predicted KLD. seconds: of each stage, when it was measured.
    """

    type: str
    types: dict[str, str]
    nbytes: int
    budget: int
    limits: tuple[int, int]
    bits_per_weight: float
    predicted: float
    predicted_stock: float | None
    gap: float
    ends: tuple[float, float]
    ends_stock: tuple[float, float] | None
    rounding: str
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()


def allocate(
    src: Path,
    budget: Budget,
    text: Text,
    *,
    imatrix: Path | None = None,
    rounding: str | None = None,
    types: Sequence[str] = (),
    tensor_types: Sequence[tuple[str, str]] = (),
    effort: str = "normal",
    repacked: frozenset[str] | None = None,
    threads: int = 0,
    progress: Progress,
) -> Allocation:
    """Find the types that lose least within a budget.

    text: to measure on, unlike what the imatrix was collected on. rounding: as quantize's; where it is sequential, types are
    chosen by the losses of compensated rounding. types: names of the candidates; none = the usual ones. tensor_types: (regular
    expression, type) of tensors that have no choice, as quantize's. effort: a name of EFFORTS. repacked: the types that
    llama.cpp repacks here, which are then preferred.
    Raises what quantize raises, QuantizeError for a budget out of reach, CorpusError.
    """
    started = time.perf_counter()
    file = GgufFile(src)
    statistics = statistics_for(src, imatrix, rounding)
    stock = plans(src, STOCK, imatrix=imatrix, rounding=rounding)
    importance = read_imatrix(imatrix).means() if imatrix else {}
    important = frozenset(importance)
    rest = space(file, stock[0], allowed_types(types, 0, file), important).rest
    nbytes = budget.of(file, rest)
    room = fixed(space(file, stock[0], allowed_types(types, nbytes, file), important), tensor_types)
    nbytes = min(nbytes, room.limits[1]) if budget.clipped else nbytes
    room.require(nbytes)
    key = _key(file, imatrix, statistics)
    plain, threads = Plain(importance), threads or physical_cores()
    subject = Subject(src, room.candidates, Compensating(plain, statistics, threads) if statistics else plain, key)
    known, groups = measure(subject, text, EFFORTS[effort], threads, progress)
    gains = known.gains(groups)
    solving = time.perf_counter()
    chosen, found = _solve(room, nbytes, known, gains, repacked)
    nearest = min(stock, key=lambda p: (abs(p.nbytes - nbytes), p.nbytes))
    made = plan(src, nearest.type, imatrix=imatrix, tensor_types=anchored(chosen), rounding=rounding)
    _check(made, chosen, room)
    loss = _losses(chosen, known, gains)
    of_stock = {t.name: t.type for t in nearest.tensors if t.name in chosen}
    stock_loss = _losses(of_stock, known, gains)
    return Allocation(
        type=nearest.type,
        types=chosen,
        nbytes=made.nbytes,
        budget=nbytes,
        limits=room.limits,
        bits_per_weight=made.bits_per_weight,
        predicted=sum(loss.values()),
        predicted_stock=sum(stock_loss.values()) if len(stock_loss) == len(chosen) else None,
        gap=found.gap,
        ends=_share_of_ends(chosen, loss, room),
        ends_stock=_share_of_ends(of_stock, stock_loss, room) if len(stock_loss) == len(chosen) else None,
        rounding=rounding_by(statistics, rounding),
        seconds=known.seconds | {"solving": time.perf_counter() - solving, "in all": time.perf_counter() - started},
    )


def repacked_here() -> frozenset[str]:
    """Names of the types that llama.cpp rearranges for this processor: their products are faster."""
    with Child("cnq.engine.probe", EngineError) as child:
        return frozenset(child.ask("repacked", {}))


def _key(file: GgufFile, imatrix: Path | None, statistics: Statistics | None) -> str:
    compensated = f"{statistics.digest} {DAMPING} {ORDERS[0]}" if statistics else ""
    parts = [fingerprint(file).hex(), sha256(imatrix) if imatrix else "", compensated]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def _solve(
    room: Space, budget: int, known: Sensitivities, gains: dict[Part, float], repacked: frozenset[str] | None
) -> tuple[dict[str, str], knapsack.Solution]:
    names = list(room.candidates)
    costs = []
    for name in names:
        row = []
        for type in room.candidates[name]:
            slow = repacked is not None and type.name not in repacked
            row.append(_loss(name, type.name, known, gains) * (_SLOWER if slow else 1.0))
        costs.append(row)
    sizes = [[room.nbytes(name, type) for type in room.candidates[name]] for name in names]
    limit = budget - room.rest
    found = knapsack.solve(costs, sizes, limit)
    if found is None:
        raise QuantizeError(f"no choice of types comes to {budget} bytes. Please report it.")
    least = int(_FILLED * budget) - room.rest
    if found.size < least:
        found = knapsack.solve(costs, sizes, limit, least) or found
    return {n: room.candidates[n][i].name for n, i in zip(names, found.chosen, strict=True)}, found


def _loss(name: str, type: str, known: Sensitivities, gains: dict[Part, float]) -> float:
    return sum(gains[part] * known.errors[part][type].output for part in gains if part.tensor == name)


def _losses(types: dict[str, str], known: Sensitivities, gains: dict[Part, float]) -> dict[str, float]:
    """Predicted KLD by tensor, of those whose type was measured."""
    measured = {part.tensor: known.errors[part] for part in gains}
    return {n: _loss(n, t, known, gains) for n, t in types.items() if t in measured[n]}


def _share_of_ends(types: dict[str, str], losses: dict[str, float], room: Space) -> tuple[float, float]:
    """Of embedding and output: their share in the bytes of the matrices, and in the predicted KLD."""
    ends = [n for n in types if not n.startswith("blk.")]
    sizes = {n: room.nbytes(n, TYPE_BY_NAME[t]) for n, t in types.items()}
    total, loss = sum(sizes.values()), sum(losses.values())
    return sum(sizes[n] for n in ends) / total, sum(losses[n] for n in ends) / loss if loss else 0.0


def _check(made: Plan, chosen: dict[str, str], room: Space) -> None:
    """What llama.cpp's dry run says must be what was computed."""
    other = [t.name for t in made.tensors if t.name in chosen and t.type != chosen[t.name]]
    if other or made.nbytes != room.total(chosen):
        raise QuantizeError(
            f"llama.cpp makes {made.nbytes} bytes where {room.total(chosen)} were computed, and another type of {other[:3]}. "
            "Please report it."
        )
