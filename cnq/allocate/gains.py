"""What an error costs: groups of tensors are rounded in the loaded model, one after the other, and the divergence is read.

For small changes of the logits KLD ≈ ½ δᵀFδ, so that a group's divergence is proportional to the mean square of its outputs'
errors: KLD = g · E. The gain g is measured: g = KLD / ΣE(q) with the group's tensors rounded to q in place, in memory. Groups
are roles by thirds of the depth, and beside them whole layers, which tell how the gain changes within a third.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from ..corpus import Chunks
from ..engine import rows
from ..engine.model import Model
from ..engine.weights import LOOKUP, PRODUCT, Weights
from ..errors import EngineError
from ..evaluate import share_out
from ..gguf_file import GgufFile, TensorType
from ..imatrix import with_bos
from ..logits_file import LogitsFile, LogitsWriter, n_scored
from ..scores import Estimate, Scores
from .groups import Part, layer_of, role_of
from .rounding import Rounding, decoded
from .samples import Sampler

_ROWS = 1 << 18  # elements rounded at once
_TURNS = 50  # of the fit, which settles in a few


class Prober(AbstractContextManager["Prober"]):
    """The float model in memory, some text, and what the model says about it."""

    def __init__(
        self, gguf: Path, text: Callable[[Model], Chunks], names: Sequence[str], scratch: Path, threads: int, n_ctx: int
    ):
        """names: of the matrices that may be rounded. scratch: a folder for the float model's log-probabilities."""
        self.file = GgufFile(gguf)
        self.names, self.threads, self._n_ctx = names, threads, n_ctx
        self._weights = Weights(self.file)
        self._model = Model(gguf, n_ctx=n_ctx, n_batch=n_ctx, n_threads=threads, writable=True, watch=self._weights)
        try:
            self._weights.locate(self._model, names)
            self.chunks = text(self._model)
        except BaseException:
            self._model.close()
            raise
        self._scratch = scratch / "base.logits"
        self._base: LogitsFile | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._model.close()

    def seconds_per_chunk(self) -> float:
        """What a chunk takes in all threads, once to warm up."""
        ids = with_bos(self._model, self.chunks.tokens[0])
        for _ in range(2):
            started = time.perf_counter()
            self._model.logits_in_place(ids, self._n_ctx // 2)
        return time.perf_counter() - started

    def uses(self, name: str) -> set[str]:
        return self._weights.uses(name)

    def read(self, per_chunk: int, progress: Callable[[int, int], object]) -> dict[str, np.ndarray]:
        """Run the text through the float model: the log-probabilities are kept for `kld`, samples of the inputs returned.

        Matrix -> (tokens, columns) float32.
        """
        tokens = self.chunks.tokens
        multiplied = [name for name in self.names if PRODUCT in self.uses(name)]
        sampler = Sampler(self.file, multiplied, per_chunk)
        self._weights.then = sampler
        with LogitsWriter(self._scratch, tokens, self._model.n_vocab) as writer:
            for chunk, ids in enumerate(tokens):
                sampler.begin(chunk)
                logits = self._model.logits_in_place(with_bos(self._model, ids), self._n_ctx // 2)[:-1]
                writer.put(chunk, 0, logits)
                progress(chunk + 1, len(tokens))
        self._weights.then = None
        self._base = LogitsFile(self._scratch)
        return sampler.inputs()

    def kld(self, rounded: Mapping[Part, TensorType], rounding: Rounding, n_chunks: int) -> Estimate:
        """The divergence from the float model while these parts are rounded: mean and standard error, nats.

        n_chunks: of the text, the first so many. Both ends of a tied embedding can be rounded apart.
        """
        if not self._base:
            raise EngineError("the float model has not read the text yet. Please report it.")
        with self._weights.restored({part.tensor for part in rounded if part.use == PRODUCT}):
            for part, type in sorted(rounded.items(), key=lambda item: item[0].use == LOOKUP):  # tables come last, and stay
                self._lay(part, type, rounding, apart=len(self.uses(part.tensor)) > 1)
            return self._measured(n_chunks)

    def _lay(self, part: Part, type: TensorType, rounding: Rounding, apart: bool) -> None:
        tensor = self.file.tensor(part.tensor)
        data = self.rounded(part.tensor, type, rounding)
        if part.use == LOOKUP:
            self._weights.look_up(
                part.tensor, decoded(data.reshape(prod(tensor.shape[:-1]), -1), tensor.type, tensor.shape[-1])
            )
            return
        if apart:  # the rows that are looked up stay the float model's, unless they are rounded as well
            table = decoded(tensor.rows(), tensor.type, tensor.shape[-1])
            self._weights.look_up(part.tensor, table)
        self._weights.write(part.tensor, data)

    def rounded(self, name: str, type: TensorType, rounding: Rounding) -> np.ndarray:
        """The tensor's bytes in the file's type, with the values that it has in another."""
        tensor = self.file.tensor(name)
        columns, height = tensor.shape[-1], tensor.shape[-2]
        stored = tensor.rows()
        out = np.empty((len(stored), tensor.type.row_bytes(columns)), np.uint8)
        step = max(1, _ROWS // columns)

        def work(place: tuple[int, int]) -> None:
            matrix, start = place
            own = slice(matrix * height + start, matrix * height + min(start + step, height))
            values = decoded(stored[own], tensor.type, columns)
            near = decoded(rounding.encoded(name, matrix, values, type), type, columns)
            rows.encode(near, tensor.type, None, out[own].reshape(-1))

        places = [(matrix, start) for matrix in range(prod(tensor.shape[:-2])) for start in range(0, height, step)]
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(work, places))
        return out

    def _measured(self, n_chunks: int) -> Estimate:
        assert self._base
        tokens, n = self.chunks.tokens[:n_chunks], n_scored(self._n_ctx)
        scores = Scores(len(tokens), n)
        base = self._base

        def measure(chunk: int, contexts: Sequence[Model]) -> None:
            (model,) = contexts
            logits = model.logits_in_place(with_bos(model, tokens[chunk]), self._n_ctx // 2)[:-1]
            targets = tokens[chunk, self._n_ctx // 2 + 1 :]
            scores.put(chunk, slice(0, n), logits, targets, base.log_probs(chunk, slice(0, n)))

        share_out(measure, [self._model], len(tokens), self.threads, threading.Event(), lambda done, total: None)
        klds = scores.kld.ravel()
        return Estimate(float(klds.mean()), float(klds.std() / np.sqrt(len(klds) - 1)))


@dataclass(frozen=True)
class Gain:
    """A group's KLD per error. raw: as measured, with its relative standard error; value: shrunk toward its role's mean."""

    raw: float
    error: float
    value: float


def gains(measured: Mapping[str, Estimate], errors: Mapping[str, float]) -> dict[str, Gain]:
    """Group -> gain, from its divergence and the sum of its tensors' errors when it was measured.

    In logarithms each gain is drawn toward its role's mean, by its share in the variance: empirical Bayes with the spread
    within roles estimated over all of them (method of moments). An end of the model is a role by itself, and stays.
    """
    groups = [g for g in measured if measured[g].value > 0 and errors[g] > 0]
    log = {g: float(np.log(measured[g].value / errors[g])) for g in groups}
    noise = {g: (measured[g].error / measured[g].value) ** 2 for g in groups}
    members: dict[str, list[str]] = {}
    for g in groups:
        members.setdefault(role_of(g), []).append(g)
    several = [m for m in members.values() if len(m) > 1]
    spread = 0.0
    if several:
        within = sum(float(np.var([log[g] for g in m], ddof=1)) * (len(m) - 1) for m in several)
        spread = max(0.0, within / sum(len(m) - 1 for m in several) - float(np.mean([noise[g] for m in several for g in m])))
    found = {}
    for m in members.values():
        weight = {g: 1 / (noise[g] + spread) if noise[g] + spread else 1.0 for g in m}
        mean = sum(weight[g] * log[g] for g in m) / sum(weight.values())
        for g in m:
            own = spread / (spread + noise[g]) if len(m) > 1 and spread + noise[g] else 1.0
            found[g] = Gain(float(np.exp(log[g])), float(np.sqrt(noise[g])), float(np.exp(own * log[g] + (1 - own) * mean)))
    return found | {g: Gain(0.0, 0.0, 0.0) for g in measured if g not in found}


def by_part(
    found: Mapping[str, Gain],
    groups: Mapping[str, Sequence[Part]],
    errors: Mapping[Part, float],
    layers: Mapping[int, Estimate],
) -> dict[Part, float]:
    """Part -> gain. Within a role it is interpolated between the middles of the thirds, in logarithms; then fitted to the
    layers measured, by turns with the groups (iterative proportional fitting, Deming and Stephan 1940), so that the sum over
    a layer's parts is in proportion to what was measured of it, and the sum over a group's is what was measured.

    errors: of each part when the gains were measured. layers: divergences of whole layers; none = interpolation alone.
    """
    out = _interpolated(found, groups)
    blocks = [[p for p in parts if layer_of(p) is not None and out[p] > 0 and errors[p] > 0] for parts in groups.values()]
    targets = [found[g].value * sum(errors[p] for p in parts) for g, parts in groups.items()]
    own: dict[int, list[Part]] = {}
    for part in (p for parts in blocks for p in parts):
        own.setdefault(layer_of(part) or 0, []).append(part)
    measured = {layer: k for layer, k in layers.items() if k.value > 0 and layer in own}
    for _ in range(_TURNS if measured else 1):
        total = sum(out[p] * errors[p] for layer in measured for p in own[layer])
        scale = total / sum(k.value for k in measured.values()) if measured else 1.0
        for layer, k in measured.items():
            _rescale(out, own[layer], errors, k.value * scale)
        for parts, target in zip(blocks, targets, strict=True):
            _rescale(out, parts, errors, target)
    return out


def _interpolated(found: Mapping[str, Gain], groups: Mapping[str, Sequence[Part]]) -> dict[Part, float]:
    middles: dict[str, list[tuple[float, float]]] = {}
    for group, parts in groups.items():
        depths = [layer for part in parts if (layer := layer_of(part)) is not None]
        if found[group].value > 0 and depths:
            middles.setdefault(role_of(group), []).append((float(np.mean(depths)), float(np.log(found[group].value))))
    out: dict[Part, float] = {}
    for group, parts in groups.items():
        curve = sorted(middles.get(role_of(group), []))
        for part in parts:
            layer = layer_of(part)
            if found[group].value > 0 and layer is not None and len(curve) > 1:
                out[part] = float(np.exp(np.interp(layer, [at for at, _ in curve], [log for _, log in curve])))
            else:
                out[part] = found[group].value
    return out


def _rescale(gains: dict[Part, float], parts: Sequence[Part], errors: Mapping[Part, float], target: float) -> None:
    """Have the parts' divergences sum up to the target."""
    total = sum(gains[p] * errors[p] for p in parts)
    for part in parts if total > 0 else ():
        gains[part] *= target / total
