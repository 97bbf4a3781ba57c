"""Float GGUF → quantized GGUF, by llama.cpp's own quantizer, with its decisions and the exact size known beforehand."""

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .engine.quantizer import DAMPING, Choice, Outcome, Quantizer
from .errors import GgufError, ImatrixRequired, QuantizeError, StatisticsError, listed
from .files import replacing
from .fingerprint import fingerprint
from .gguf_file import BF16, F16, F32, TYPE_BY_NAME, GgufFile, retyped
from .hessian_file import Statistics, beside, between_bytes, complete_statistics
from .imatrix_file import Importance, read_imatrix

_NEVER_STORED = frozenset({"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"})  # not in ggml.c, ggml_quantize_chunk
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's
# llama.cpp src/llama-quant.cpp, tensor_requires_imatrix: not asked of these two tensors, which get no imatrix as a rule …
_NEED_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
_ENDS = ("token_embd.weight", "output.weight")
# … but ggml.c, ggml_quantize_requires_imatrix, aborts the process for any tensor without one.
_ABORT_WITHOUT = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
_QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION
_MAX_KV = 127  # bytes of a string in llama_model_kv_override
ROUNDINGS = ("plain", "compensated", "sequential")


@dataclass(frozen=True)
class TensorPlan:
    """What one tensor becomes. wanted: the type it fell back from, as its rows do not fill that type's blocks."""

    name: str
    shape: tuple[int, ...]
    from_type: str
    type: str
    wanted: str | None
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """A quantization before it is done. nbytes: exact size of the file. bits_per_weight: of tensor data, as llama-quantize."""

    type: str
    tensors: tuple[TensorPlan, ...]
    nbytes: int
    bits_per_weight: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Quantized:
    """rounding: of ROUNDINGS. compensation: what came of it, matrix by matrix; empty when plain."""

    path: Path
    type: str
    imatrix: Path | None
    nbytes_before: int
    nbytes: int
    bits_per_weight: float
    notes: tuple[str, ...]
    seconds: float
    rounding: str = "plain"
    compensation: tuple[Outcome, ...] = ()


def plan(
    src: Path,
    type: str,
    *,
    imatrix: Path | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
    allow_requantize: bool = False,
    rounding: str | None = None,
) -> Plan:
    """What `quantize` would do with the same arguments. Raises what it would raise before it starts."""
    statistics = statistics_for(src, imatrix, rounding)
    arguments = (type, imatrix, tensor_types, output_type, embedding_type, pure, allow_requantize, statistics, rounding)
    with Quantizer(src) as child:
        return _prepare(child, *arguments)[0]


def plans(src: Path, types: Sequence[str], *, imatrix: Path | None = None, rounding: str | None = None) -> list[Plan]:
    """`plan` for several types, by one process. Types that the imatrix does not suffice for are left out."""
    statistics = statistics_for(src, imatrix, rounding)
    found = []
    with Quantizer(src) as child:
        for type in types:
            with suppress(ImatrixRequired):
                found.append(_prepare(child, type, imatrix, (), None, None, False, False, statistics, rounding)[0])
    return found


def quantize(
    src: Path,
    dst: Path,
    type: str,
    *,
    imatrix: Path | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
    allow_requantize: bool = False,
    rounding: str | None = None,
    threads: int = 0,
    force: bool = False,
    progress: Callable[[str, int, int], object] = lambda name, number, total: None,
) -> Quantized:
    """Quantize the float GGUF `src` into `dst`; with plain rounding the bytes are llama-quantize's.

    type: a name of Quantizer.ftypes(). imatrix: weighs the rounding errors, GGUF or legacy .dat.
    tensor_types: (regular expression searched in the tensor's name, type), the first match counts; the other tensors keep
    the type they would have had without. pure: one type throughout, no mixture.
    rounding: "compensated" chooses the codes again so that they make up for each other's errors (engine/compensate.py), by
    the second moments beside the imatrix (hessian_file.beside); types and sizes stay. "sequential" runs the text that they
    are of once more, layer by layer, and has each layer make up for those before it, too (engine/sequential.py). None:
    compensated where there are second moments.
    progress: hears each tensor's name as it begins, its number, and how many there are.
    Raises GgufError, ImatrixRequired, QuantizeError, StatisticsError, OutputExists, NoSpace.
    """
    started = time.perf_counter()
    statistics = statistics_for(src, imatrix, rounding)
    arguments = (type, imatrix, tensor_types, output_type, embedding_type, pure, allow_requantize, statistics, rounding)
    with Quantizer(src) as child:
        planned, fields = _prepare(child, *arguments)
        types = {t.name: TYPE_BY_NAME[t.type] for t in planned.tensors}
        folder = statistics.folder if statistics else None
        between = between_bytes(GgufFile(src), statistics) if statistics and rounding == "sequential" else 0
        with (
            replacing(dst, force=force, need=planned.nbytes + between) as partial,
            _scratch(child, dst.parent, rounding) as scratch,
        ):
            outcomes = child.round(
                partial, types, fields, imatrix=imatrix, statistics=folder, sequential=scratch, threads=threads,
                progress=progress,
            )  # fmt: skip
    return Quantized(
        path=dst,
        type=planned.type,
        imatrix=imatrix,
        nbytes_before=src.stat().st_size,
        nbytes=planned.nbytes,
        bits_per_weight=planned.bits_per_weight,
        notes=(*planned.notes, *_told(outcomes)),
        seconds=time.perf_counter() - started,
        rounding=rounding_by(statistics, rounding),
        compensation=tuple(outcomes),
    )


@contextmanager
def _scratch(child: Quantizer, folder: Path, rounding: str | None) -> Iterator[Path | None]:
    """A folder for the files in between that sequential rounding has; the child is ended before it goes."""
    if rounding != "sequential":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix=".cnq-", dir=folder) as scratch:
        try:
            yield Path(scratch)
        finally:
            child.end()


def statistics_for(src: Path, imatrix: Path | None, rounding: str | None) -> Statistics | None:
    """Those that `quantize` rounds by with these arguments; None = plainly. Raises StatisticsError."""
    if rounding not in (None, *ROUNDINGS):
        raise QuantizeError(f"unknown rounding {rounding}; there is {', '.join(ROUNDINGS)}.")
    if rounding == "plain":
        return None
    if imatrix is None or not beside(imatrix).exists():
        if rounding is None:
            return None
        where = f"{beside(imatrix)} does not exist" if imatrix else "no --imatrix was given"
        raise StatisticsError(
            f"{rounding} rounding takes second moments beside the importance matrix, but {where}. "
            f"Collect them: cnq imatrix {src} --hessian"
        )
    file = GgufFile(src)
    statistics = complete_statistics(beside(imatrix), fingerprint(file).hex())
    if rounding == "sequential":
        _require_layers(file)
        statistics.tokens()
    return statistics


def rounding_by(statistics: Statistics | None, asked: str | None) -> str:
    """Of ROUNDINGS, the one that is done where so much was asked and these statistics were found."""
    return asked or ("compensated" if statistics else "plain")


def _require_layers(file: GgufFile) -> None:
    """Refuse models whose layers llama.cpp would not run one by one as it runs them together."""
    n = file.fields.get(f"{file.arch}.block_count")
    several = [k for k, v in file.fields.items() if k.startswith(f"{file.arch}.") and isinstance(v, list) and len(v) == n]
    why = f"it says {listed(several)} for each layer by itself" if several else None
    if file.arch == "baichuan":
        why = "llama.cpp tells one Baichuan from the other by the number of its layers"
    if why:
        raise QuantizeError(
            f"{file.path}: its layers cannot be run one by one, as {why}. Round without that: --rounding compensated"
        )


def _rounding_fields(statistics: Statistics, method: str) -> dict[str, str | int]:
    """The keys that tell of the rounding in the file; readers that do not know them pass them over."""
    return {
        "cnq.rounding.method": method,
        "cnq.rounding.damping": f"{DAMPING:g}",
        "cnq.rounding.statistics": statistics.digest,
    }


def _told(outcomes: Sequence[Outcome]) -> list[str]:
    """How many matrices were compensated, and which were not, for what reason."""
    if not outcomes:
        return []
    plain: dict[str, list[str]] = {}
    for o in outcomes:
        if not o.kept:
            reason = o.reason or "no better on the inputs held back"
            plain.setdefault(reason, []).append(o.name if o.expert is None else f"{o.name} expert {o.expert}")
    kept = sum(o.kept for o in outcomes)
    told = [f"compensated {kept} of {len(outcomes)} matrices"]
    return told + [f"{len(names)} rounded plainly, {reason}: {listed(names)}" for reason, names in plain.items()]


def _prepare(
    child: Quantizer,
    type: str,
    imatrix: Path | None,
    tensor_types: Sequence[tuple[str, str]],
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
    allow_requantize: bool,
    statistics: Statistics | None,
    rounding: str | None,
) -> tuple[Plan, dict[str, str | int]]:
    """The plan, and the metadata that the file gets besides its source's."""
    src = child.src
    file = GgufFile(src)
    offered = child.ftypes()
    type = ALIASES.get(type.upper(), type.upper())
    if type not in offered:
        raise QuantizeError(f"unknown type {type}; llama.cpp offers {', '.join(offered)}.")
    _require_float(src, file, allow_requantize)
    importance = read_imatrix(imatrix) if imatrix else None
    if importance:
        _require_same_model(src, imatrix, file, importance)
    storable = [name for name in TYPE_BY_NAME if name not in _NEVER_STORED]
    for name in (output_type, embedding_type, *(t for _, t in tensor_types)):
        if name is not None and name not in storable:
            raise QuantizeError(f"unknown tensor type {name}; llama.cpp stores {', '.join(storable)}.")

    def decided(overrides: Sequence[tuple[str, str]]) -> list[Choice]:
        return child.decide(
            offered[type], with_imatrix=imatrix is not None, tensor_types=overrides, output_type=output_type,
            embedding_type=embedding_type, pure=pure, requantize=allow_requantize,
        )  # fmt: skip

    choices = decided(())
    if tensor_types:
        wished = decided(_anchored(type, choices, file, tensor_types))
        choices = [old if old.type == new.type else new for old, new in zip(choices, wished, strict=True)]
    _require_imatrix(src, type, choices, importance)
    fields: dict[str, str | int] = {"general.quantization_version": _QUANTIZATION_VERSION, "general.file_type": offered[type]}
    if imatrix and importance:
        fields |= _imatrix_fields(imatrix, importance)
    if statistics:
        fields |= _rounding_fields(statistics, rounding_by(statistics, rounding))
    return _plan(type, file, choices, fields, importance), fields


def _imatrix_fields(path: Path, importance: Importance) -> dict[str, str | int]:
    """The keys that tell of the imatrix in the quantized file; as llama-quantize writes them, but for the file's folder."""
    fields: dict[str, str | int] = {"quantize.imatrix.file": _clipped(path.name)}
    if importance.datasets:
        fields["quantize.imatrix.dataset"] = _clipped(importance.datasets[0])
    fields["quantize.imatrix.entries_count"] = len(importance.sums)
    if importance.n_chunks > 0:
        fields["quantize.imatrix.chunks_count"] = importance.n_chunks
    return fields


def _clipped(text: str) -> str:
    return text.encode()[:_MAX_KV].decode("utf-8", "ignore")


def _require_float(src: Path, file: GgufFile, allow_requantize: bool) -> None:
    quantized = [t for t in file.tensors.values() if t.type not in (F32, F16, BF16)]
    if quantized and not allow_requantize:
        kinds = sorted({t.type.name for t in quantized})
        raise QuantizeError(
            f"{src} is quantized already ({', '.join(kinds)}). Start from the F16 file: what one quantization lost, another "
            "cannot bring back. To do it all the same: --allow-requantize."
        )


def _require_same_model(src: Path, imatrix: Path | None, file: GgufFile, importance: Importance) -> None:
    """Every entry must be of a tensor of this model, with as many columns."""
    for name, sums in importance.sums.items():
        if name not in file.tensors:
            raise GgufError(f"{imatrix} is of another model: it has {name}, which {src} has not. Give this model's own.")
        shape = file.tensors[name].shape
        if sums.size != shape[-1] * prod(shape[:-2]):
            raise GgufError(
                f"{imatrix} is of another model: {sums.size} values for {name}, whose rows in {src} have {shape[-1]}. "
                "Give this model's own."
            )


def anchored(types: Mapping[str, str]) -> list[tuple[str, str]]:
    """tensor_types of `quantize` for tensors by name."""
    return [(f"^{re.escape(name)}$", type) for name, type in types.items()]


def _anchored(type: str, stock: list[Choice], file: GgufFile, wishes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """One override for each tensor that llama.cpp would quantize: the user's, or its own choice.

    An override of some attn_v or ffn_down alone would shift llama.cpp's schedule for the rest: it counts those it decides.
    """
    if TYPE_BY_NAME.get(type) in (F32, F16, BF16):
        raise QuantizeError(f"--tensor-type has no effect with {type}: llama.cpp heeds it for quantized types only.")
    for pattern, _ in wishes:
        try:
            hit = any(re.search(pattern, name) for name in file.tensors)
        except re.error as error:
            raise QuantizeError(f"--tensor-type {pattern}: not a regular expression ({error}).") from None
        if not hit:
            raise QuantizeError(
                f"--tensor-type {pattern}: no tensor has such a name. Names are like {listed(file.tensors, 4)}."
            )
    overrides = []
    for choice in stock:
        if choice.type == file.tensors[choice.name].type and choice.wanted is None:
            continue  # norms and vectors, which llama.cpp leaves alone
        wish = next((t for pattern, t in wishes if re.search(pattern, choice.name)), choice.type.name)
        overrides.append((choice.name, wish))
    return anchored(dict(overrides))


def _require_imatrix(src: Path, type: str, choices: list[Choice], importance: Importance | None) -> None:
    """Refuse before work starts what llama.cpp would refuse in the middle of it."""
    for c in choices:
        if c.name in _ENDS and c.type.name in _ABORT_WITHOUT and (importance is None or c.name not in importance.sums):
            raise ImatrixRequired(
                f"{c.name} cannot become {c.type.name} without importance data, which is not collected for it. "
                f"Give it another type: --{'embedding' if c.name == _ENDS[0] else 'output'}-type Q4_K."
            )
    needing = [
        c.name
        for c in choices
        if c.name not in _ENDS and (c.type.name in _NEED_IMATRIX or (c.type.name == "Q2_K" and type == "Q2_K_S"))
    ]
    if not needing:
        return
    if importance is None:
        raise ImatrixRequired(
            f"{type} rounds {len(needing)} tensors too coarsely to do without an importance matrix "
            f"({listed(needing, 2)}). Give one with --imatrix."
        )
    if without := [name for name in needing if name not in importance.sums]:
        raise ImatrixRequired(f"{src}: the importance matrix has nothing for {listed(without)}, and {type} cannot do without.")


def _plan(
    type: str, file: GgufFile, choices: list[Choice], fields: dict[str, str | int], importance: Importance | None
) -> Plan:
    tensors = tuple(
        TensorPlan(
            c.name, info.shape, info.type.name, c.type.name, c.wanted.name if c.wanted else None,
            prod(info.shape[:-1]) * c.type.row_bytes(info.shape[-1]),
        )
        for c in choices
        for info in [file.tensors[c.name]]
    )  # fmt: skip
    notes = []
    fallen = [t for t in tensors if t.wanted]
    if fallen:
        widths = listed(str(w) for w in sorted({t.shape[-1] for t in fallen}))
        notes.append(
            f"{len(fallen)} of {len(tensors)} tensors fell back to a larger type: rows of {widths} do not fill blocks of "
            f"{TYPE_BY_NAME[fallen[0].wanted or type].block}"
        )
    if importance:
        bare = [t.name for t in tensors if t.type != t.from_type and t.name not in importance.sums]
        bare = [name for name in bare if name not in _ENDS]
        if bare:
            notes.append(f"no importance data for {len(bare)} tensors, rounded without: {listed(bare)}")
    return Plan(
        type=type,
        tensors=tensors,
        nbytes=retyped(file, fields, {c.name: c.type for c in choices}).nbytes,
        bits_per_weight=sum(t.nbytes for t in tensors) * 8 / file.n_params,
        notes=tuple(notes),
    )
