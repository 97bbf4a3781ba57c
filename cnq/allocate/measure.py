"""Errors and gains of a model, measured once and kept beside it: <model>.sensitivity.json."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from ..corpus import Chunks, Source, cutter
from ..engine.model import Model
from ..errors import CnqError
from ..files import replacing
from ..gguf_file import TYPE_BY_NAME, GgufFile, TensorType
from ..scores import Estimate
from .candidates import beside
from .gains import Prober, by_part, gains
from .groups import Part, grouped, layer_of
from .rounding import Compensating, Plain, decoded
from .samples import tokens_kept
from .scan import Error, Errors, extrapolated, scan

CACHE = ".sensitivity.json"
N_CTX = 512
_REFERENCE = ("Q4_K", "Q4_0", "Q8_0")  # what groups are rounded to when their gain is measured: the first that fits
_TRIAL = 32  # rows that the speed of rounding is told from


class Progress(Protocol):
    """What is told while work is done."""

    def say(self, text: str) -> None: ...

    def bar(self, what: str, unit: str) -> AbstractContextManager[Callable[[int, int], object]]: ...


@dataclass(frozen=True)
class Effort:
    """How much is measured. chunks: of text that each group is probed on. layer_chunks: that each layer is; 0 = layers are not.
    rows: of each matrix. tokens: inputs kept of it.

    every: whether compensated rounding is tried on all tensors, or on one of each group.
    """

    name: str
    chunks: int
    layer_chunks: int
    rows: int
    tokens: int
    every: bool


EFFORTS = {e.name: e for e in (Effort("fast", 2, 0, 64, 128, False), Effort("normal", 6, 2, 128, 256, False),
                               Effort("thorough", 16, 8, 256, 512, True))}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """cut: makes so many chunks with a model's tokenizer. digest: of what they are made from."""

    cut: Callable[[Model, int], Chunks]
    digest: str


def text_of(sources: Sequence[Source], skip: int, parse_special: bool = False) -> Text:
    """A text to measure on: what follows the first `skip` chunks of the sources, which the imatrix was collected on."""

    def cut(model: Model, n_chunks: int) -> Chunks:
        whole = cutter(sources, N_CTX, skip + n_chunks, special=parse_special)(model)
        return Chunks(whole.tokens[-n_chunks:], whole.manifest)

    digest = hashlib.sha256(" ".join([str(skip), *(f"{s.name} {s.sha256} {s.weight}" for s in sources)]).encode())
    return Text(cut, digest.hexdigest()[:16])


@dataclass
class Sensitivities:
    """errors: of each part in each type. klds: group -> its divergence when rounded to its reference type, plainly; layers: of
    whole layers.

    references: part -> plain error of its weights alone in that type. seconds: of each stage, when it was measured.
    """

    errors: Errors = field(default_factory=dict)
    klds: dict[str, Estimate] = field(default_factory=dict)
    layers: dict[int, Estimate] = field(default_factory=dict)
    references: dict[Part, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def gains(self, groups: Mapping[str, Sequence[Part]]) -> dict[Part, float]:
        """Part -> KLD per error."""
        totals = {g: sum(self.references[part] for part in parts) for g, parts in groups.items()}
        return by_part(gains(self.klds, totals), groups, self.references, self.layers)

    def lacks(self, wanted: Mapping[Part, Sequence[TensorType]]) -> dict[Part, list[TensorType]]:
        missing = {part: [t for t in types if t.name not in self.errors.get(part, {})] for part, types in wanted.items()}
        return {part: types for part, types in missing.items() if types}


@dataclass(frozen=True)
class Subject:
    """What is measured: a float GGUF, how it will be rounded, and on what text."""

    gguf: Path
    candidates: Mapping[str, Sequence[TensorType]]
    rounding: Plain | Compensating
    key: str  # of model, importance, statistics and text

    @property
    def plain(self) -> Plain:
        return self.rounding if isinstance(self.rounding, Plain) else self.rounding.plain


def measure(
    subject: Subject, text: Text, effort: Effort, threads: int, progress: Progress
) -> tuple[Sensitivities, dict[str, list[Part]]]:
    """Errors and divergences, from the cache what it has; and the groups."""
    file = GgufFile(subject.gguf)
    groups = grouped([file.tensors[n] for n in subject.candidates], "output.weight" not in file.tensors)
    cache = _Cache(beside(subject.gguf, CACHE), f"{subject.key} {effort} {text.digest}")
    known = cache.load()
    wanted = {part: list(subject.candidates[part.tensor]) for parts in groups.values() for part in parts}
    missing = known.lacks(wanted)
    unknown = [g for g in groups if g not in known.klds]
    work = _Work(subject, file, groups, text, effort, threads, progress)
    layers = {layer: parts for layer, parts in work.layers().items() if layer not in known.layers}
    if missing or unknown or layers:
        work.run(known, missing, unknown, layers, lambda: cache.save(known))
    return known, groups


class _Work:
    def __init__(
        self, subject: Subject, file: GgufFile, groups: dict[str, list[Part]], text: Text, effort: Effort, threads: int,
        progress: Progress,
    ):  # fmt: skip
        self.subject, self.file, self.groups, self.text = subject, file, groups, text
        self.effort, self.threads, self.progress = effort, threads, progress
        self.reference = {g: self._reference(parts[0].tensor) for g, parts in groups.items()}

    def _reference(self, name: str) -> TensorType:
        columns = self.file.tensors[name].shape[-1]
        fitting = [t for t in (TYPE_BY_NAME[n] for n in _REFERENCE) if columns % t.block == 0]
        return fitting[0] if fitting else self.file.tensors[name].type

    def layers(self) -> dict[int, dict[Part, TensorType]]:
        """Layer -> its parts, and the types that they are rounded to when it is measured; none where layers are not."""
        if not self.effort.layer_chunks:
            return {}
        found: dict[int, dict[Part, TensorType]] = {}
        for group, parts in self.groups.items():
            for part in parts:
                if (layer := layer_of(part)) is not None:
                    found.setdefault(layer, {})[part] = self.reference[group]
        return dict(sorted(found.items()))

    def run(
        self, known: Sensitivities, missing: dict[Part, list[TensorType]], unknown: list[str],
        layers: dict[int, dict[Part, TensorType]], keep: Callable[[], object],
    ) -> None:  # fmt: skip
        """Measure what is missing; `keep` is called whenever more is known."""
        effort, names = self.effort, list(self.subject.candidates)
        with tempfile.TemporaryDirectory(prefix=".cnq-", dir=self.subject.gguf.parent) as scratch:
            cut = lambda model: self.text.cut(model, effort.chunks)  # noqa: E731
            with Prober(self.subject.gguf, cut, names, Path(scratch), self.threads, N_CTX) as prober:
                self.progress.say(self._expected(prober, missing, unknown, len(layers)))
                per_chunk = max(1, tokens_kept(self.file, names, effort.tokens) // effort.chunks)
                with self._timed(known, "reading", "chunks") as tick:
                    inputs = prober.read(per_chunk, tick)
                with self._timed(known, "error model", "tensors") as tick:
                    self._scan(known, missing, unknown, inputs, prober.chunks.tokens, tick)
                    keep()
                with self._timed(known, "sensitivities", "groups") as tick:
                    for i, group in enumerate(unknown, 1):
                        rounded = dict.fromkeys(self.groups[group], self.reference[group])
                        known.klds[group] = prober.kld(rounded, self.subject.plain, effort.chunks)
                        keep()
                        tick(i, len(unknown) + len(layers))
                    for i, (layer, rounded) in enumerate(layers.items(), len(unknown) + 1):
                        known.layers[layer] = prober.kld(rounded, self.subject.plain, effort.layer_chunks)
                        keep()
                        tick(i, len(unknown) + len(layers))

    def _timed(self, known: Sensitivities, stage: str, unit: str) -> AbstractContextManager[Callable[[int, int], object]]:
        return _Timed(known.seconds, stage, self.progress.bar(stage, unit))

    def _scan(
        self, known: Sensitivities, missing: dict[Part, list[TensorType]], unknown: list[str],
        inputs: dict[str, np.ndarray], tokens: np.ndarray, tick: Callable[[int, int], object],
    ) -> None:  # fmt: skip
        """The errors that are missing, and those that the gains are measured by."""
        effort, rounding = self.effort, self.subject.rounding
        references = {part: self.reference[g] for g in unknown for part in self.groups[g]}
        plain_types = {
            part: list(dict.fromkeys([*missing.get(part, []), *([references[part]] if part in references else [])]))
            for parts in self.groups.values()
            for part in parts
        }
        plain_types = {part: types for part, types in plain_types.items() if types}
        found = scan(self.file, plain_types, inputs, tokens, self.subject.plain, effort.rows, self.threads, tick)
        for g in unknown:
            known.references |= {part: found[part][self.reference[g].name].weight for part in self.groups[g]}
        if isinstance(rounding, Compensating) and missing:
            some = [parts[:] if effort.every else [parts[len(parts) // 2]] for parts in self.groups.values()]
            few = {part: plain_types[part] for parts in some for part in parts if part in missing}
            again = scan(self.file, few, inputs, tokens, rounding, effort.rows, self.threads, tick)
            found = extrapolated(found, again, self.groups)
        for part, types in missing.items():
            known.errors.setdefault(part, {}).update({t.name: found[part][t.name] for t in types})

    def _expected(self, prober: Prober, missing: dict[Part, list[TensorType]], unknown: list[str], n_layers: int) -> str:
        """How long it will take, from the speeds of this machine: a chunk read, and a few rows rounded to each type."""
        chunk = prober.seconds_per_chunk()
        speeds = self._speeds({t for types in missing.values() for t in types} | set(self.reference.values()))
        rows = min(self.effort.rows, 1 << 20)
        scanned = sum(
            rows * self.file.tensors[p.tensor].shape[-1] / speeds[t.name] for p, types in missing.items() for t in types
        )
        weights = {g: sum(self.file.tensors[p.tensor].n_elements for p in self.groups[g]) for g in unknown}
        laid = sum(n / speeds[self.reference[g].name] for g, n in weights.items())
        passes = self.effort.chunks * (1 + len(unknown)) + self.effort.layer_chunks * n_layers
        again = laid if n_layers else 0.0  # all of them a second time
        seconds = chunk * passes + (2 * scanned + laid + again) / self.threads
        if isinstance(self.subject.rounding, Compensating):
            seconds += self._compensating(missing)
        return (
            f"measuring how sensitive {self.subject.gguf.name} is takes about {minutes(seconds)} ({self.effort.name}: "
            f"{len(unknown)} groups and {n_layers} layers, {passes} chunks of {chunk:.1f} s)"
        )

    def _speeds(self, types: Iterable[TensorType]) -> dict[str, float]:
        """Weights a second in one thread, by type."""
        name = max(self.subject.candidates, key=lambda n: self.file.tensors[n].shape[-1])
        tensor = self.file.tensor(name)
        values = decoded(tensor.rows()[:_TRIAL], tensor.type, tensor.shape[-1])
        found = {}
        for type in types:
            started = time.perf_counter()
            if tensor.shape[-1] % type.block == 0:
                self.subject.plain.encoded(name, 0, values, type)
            found[type.name] = values.size / max(time.perf_counter() - started, 1e-4)
        return found

    def _compensating(self, missing: dict[Part, list[TensorType]]) -> float:
        """Seconds of the trial compensated roundings: one is timed, others go by their columns, factors by their square."""
        tried = [parts if self.effort.every else [parts[len(parts) // 2]] for parts in self.groups.values()]
        todo = {p: missing[p] for parts in tried for p in parts if p in missing}
        if not todo:
            return 0.0
        columns = {p: self.file.tensors[p.tensor].shape[-1] for p in todo}
        first, *_ = probed = list(todo)
        probe = probed[len(probed) // 2]

        def seconds(part: Part, n: int) -> float:
            tensor = self.file.tensor(part.tensor)
            values = decoded(tensor.rows()[:n], tensor.type, tensor.shape[-1])
            started = time.perf_counter()
            self.subject.rounding.encoded(part.tensor, 0, values, todo[part][len(todo[part]) // 2])
            return time.perf_counter() - started

        with threadpool_limits(1, "blas"):
            seconds(first, 1)  # compiles
            factor, rounding = seconds(probe, 1), seconds(probe, self.effort.rows)
        factors = sum((columns[p] / columns[probe]) ** 2 for p in todo) * factor
        return factors + rounding * sum(len(todo[p]) * columns[p] / columns[probe] for p in todo) / self.threads


class _Timed(AbstractContextManager[Callable[[int, int], object]]):
    """A bar whose time is added to a record."""

    def __init__(self, seconds: dict[str, float], stage: str, bar: AbstractContextManager[Callable[[int, int], object]]):
        self._seconds, self._stage, self._bar = seconds, stage, bar

    def __enter__(self) -> Callable[[int, int], object]:
        self._started = time.perf_counter()
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + time.perf_counter() - self._started


def minutes(seconds: float) -> str:
    """A duration for a person, rounded as an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds / 5) * 5)} s"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class _Cache:
    """A file of measurements by key. What cannot be read is measured anew; where nothing can be written nothing is kept."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def _all(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
        except (OSError, ValueError):
            return {}

    def load(self) -> Sensitivities:
        try:
            kept = self._all()[self.key]
            errors: Errors = {
                Part(e["tensor"], e["use"]): {t: Error(*pair) for t, pair in e["errors"].items()} for e in kept["errors"]
            }
            klds = {g: Estimate(*pair) for g, pair in kept["klds"].items()}
            references = {Part(e["tensor"], e["use"]): e["reference"] for e in kept["errors"]}
            layers = {int(layer): Estimate(*pair) for layer, pair in kept["layers"].items()}
            return Sensitivities(errors, klds, layers, references, dict(kept["seconds"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return Sensitivities()

    def save(self, known: Sensitivities) -> None:
        kept = {
            "errors": [
                asdict(part)
                | {"reference": known.references[part], "errors": {t: (e.weight, e.output) for t, e in errors.items()}}
                for part, errors in known.errors.items()
            ],
            "klds": {g: (k.value, k.error) for g, k in known.klds.items()},
            "layers": {str(layer): (k.value, k.error) for layer, k in known.layers.items()},
            "seconds": known.seconds,
        }
        content = self._all() | {self.key: kept}
        try:
            with replacing(self.path, force=True) as partial:
                partial.write_text(json.dumps(content), encoding="utf-8")
        except CnqError:  # a folder that others own: the next run measures again
            return
