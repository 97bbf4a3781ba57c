"""Collecting second moments: H = Σ x xᵀ of every input of a matrix product, what rounding with compensation needs.

GPTQ (arXiv 2210.17323), section 3. Matrices that are multiplied with the same input share one H. Inputs are summed a slice of
the model at a time, as many as memory holds; each slice runs the text again, up to its own last product. Some chunks are held
back, to judge by: of their rows x a sketch is kept, Σ s xᵀ with a column s of random signs for each.
"""

import ctypes
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from .engine import ggml
from .engine.model import Model
from .errors import EngineError, NoSpace, StatisticsError
from .files import decimal
from .gguf_file import GgufFile
from .hessian_file import (
    HELD_EVERY,
    Input,
    Source,
    Statistics,
    add_outer,
    add_product,
    digest_of,
    is_held,
    parts,
    read_statistics,
    signs,
)
from .machine import free_memory

_PROBE = 32  # tokens; llama.cpp builds other graphs for very few
_ROOM = 1 << 30  # bytes left to the contexts of llama.cpp and the rest


class _Probe:
    """Sees what a pass multiplies: weights with their input, in the order of the graph. Nothing is shown."""

    def __init__(self, file: GgufFile):
        tied = "output.weight" not in file.tensors  # then the embedding is the output matrix too
        ends = {"token_embd.weight"} if tied else {"output.weight"}
        self.wanted = {n for n, t in file.tensors.items() if n in ends or _is_rounded(n, len(t.shape))}
        self.file = file
        self.inputs: dict[tuple[int, int], list[str]] = {}  # (address as a graph node, columns) -> weights
        self._products = (ggml.op("MUL_MAT"), ggml.op("MUL_MAT_ID"))

    def __call__(self, tensor: ggml.Tensor, ask: bool) -> bool:
        if ask and tensor.op in self._products:
            weight, inputs = tensor.src[0].contents, tensor.src[1].contents
            name = weight.name.decode("utf-8", "replace")
            if name in self.wanted:
                ggml.check(weight, self.file.tensors[name])
                self.inputs.setdefault((ctypes.addressof(inputs), inputs.ne[0]), []).append(name)
        return not ask

    def found(self) -> tuple[Input, ...]:
        made = []
        for (_, columns), weights in self.inputs.items():
            shape = self.file.tensors[weights[0]].shape
            experts = [None] if len(shape) == 2 else list(range(shape[0]))
            made += [Input(tuple(weights), expert, columns) for expert in experts]
        return tuple(made)


def _is_rounded(name: str, n_dims: int) -> bool:
    """Whether llama.cpp may quantize a matrix of a layer: it leaves routers of experts alone (llama-quant.cpp)."""
    return name.startswith("blk.") and name.endswith(".weight") and n_dims > 1 and "ffn_gate_inp" not in name


class Watching:
    """llama.cpp's evaluation callback for several watchers, each of which sees a pass until it has seen enough."""

    def __init__(self) -> None:
        self._all: Sequence = ()
        self._open: list = []

    def use(self, *watchers: object) -> None:
        self._all, self._open = watchers, list(watchers)

    def __call__(self, tensor: ggml.Tensor, ask: bool) -> bool:
        if ask:
            return any(watch(tensor, True) for watch in self._open)
        self._open = [watch for watch in self._open if watch(tensor, False)]
        if self._open:
            return True
        self._open = list(self._all)  # a chunk may take several passes
        return False


class Sums:
    """The sums of a slice of inputs while the text runs."""

    def __init__(self, inputs: dict[int, Input], pool: Executor):
        """inputs: by their number, in the order of the graph. pool: computes, and goes best where BLAS has a single thread."""
        self.inputs, self._pool = inputs, pool
        self.numbers = {n: np.zeros(i.nbytes // 4, np.float32) for n, i in inputs.items()}
        self.rows = {n: [0, 0] for n in inputs}
        self._by_weight: dict[str, list[int]] = {}
        for number, one in inputs.items():
            self._by_weight.setdefault(one.weights[0], []).append(number)
        self._last = next(reversed(self._by_weight))
        self._mul_mat, self._mul_mat_id = ggml.op("MUL_MAT"), ggml.op("MUL_MAT_ID")
        self._signs: np.ndarray | None = None  # of a chunk that is held back

    def begin(self, chunk: int, n_tokens: int) -> None:
        self._signs = signs(chunk, n_tokens) if is_held(chunk) else None

    def __call__(self, tensor: ggml.Tensor, ask: bool) -> bool:
        if tensor.op not in (self._mul_mat, self._mul_mat_id):
            return not ask
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode("utf-8", "replace")
        numbers = self._by_weight.get(name)
        if numbers is None:
            return not ask
        if ask:
            return True
        if not ggml.is_float32(inputs):
            raise EngineError(f"{name}: llama.cpp multiplies it with another type than F32. Round without: --rounding plain")
        x = ggml.array(inputs)
        if tensor.op == self._mul_mat:
            self._add(numbers[0], name, x.reshape(-1, inputs.ne[0]), slice(None))
        else:
            self._experts(numbers, name, x[0], ggml.array(tensor.src[2].contents, np.int32)[0, 0])
        return name != self._last

    def _experts(self, numbers: list[int], name: str, x: np.ndarray, chosen: np.ndarray) -> None:
        """x: (tokens, 1 or experts used, columns). chosen: (tokens, experts used)."""
        for number in numbers:
            token, slot = np.nonzero(chosen == self.inputs[number].expert)
            self._add(number, name, x[token, slot % x.shape[1]], token)

    def _add(self, number: int, name: str, x: np.ndarray, tokens: slice | np.ndarray) -> None:
        """x: (n, columns), the inputs of these tokens of the chunk."""
        if not np.isfinite(x.sum()):
            raise EngineError(
                f"{name}: its inputs are not finite. The model overflows float16, or is damaged: "
                "convert it with --dtype bf16 or f32."
            )
        packed, held = parts(self.numbers[number], x.shape[1])
        if self._signs is None:
            add_outer(packed, x, self._pool)
        else:
            add_product(held, self._signs[tokens], x, self._pool)
        self.rows[number][self._signs is not None] += len(x)

    def result(self) -> dict[int, tuple[np.ndarray, int, int]]:
        return {n: (self.numbers[n], self.rows[n][0], self.rows[n][1]) for n in self.inputs}


@contextmanager
def summing_threads(threads: int) -> Iterator[Executor]:
    """Threads for Sums; BLAS has a single one meanwhile. Its own would wait for each other, and for llama.cpp's, by spinning:
    on cores that other programs use too, ten times the time was seen."""
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        yield pool


def prepare(
    folder: Path, model: Model, watching: Watching, tokens: np.ndarray, datasets: tuple[str, ...], n_ctx: int
) -> Statistics:
    """The statistics in `folder` to be completed: those of an interrupted run of the same model and text, or new ones.

    watching: the model's. tokens: (chunks, n_ctx) int32, as they are run. Raises NoSpace when the disk does not hold what is
    missing.
    """
    source = Source(model.fingerprint, digest_of(tokens), n_ctx, len(tokens), HELD_EVERY, datasets)
    found = None
    with suppress(StatisticsError):  # none, or damaged: made anew
        found = read_statistics(folder)
    if found is None or found.source != source:
        probe = _Probe(GgufFile(model.path))
        watching.use(probe)
        model.feed(tokens[0, :_PROBE].tolist())
        found = Statistics(folder, source, probe.found())
    folder.mkdir(parents=True, exist_ok=True)
    need, free = sum(found.inputs[n].nbytes for n in found.missing), shutil.disk_usage(folder).free
    if free < need:
        raise NoSpace(
            f"{folder}: {decimal(need)} of disk needed for second moments, {decimal(free)} free. Make room, name an output on "
            "another disk, or round without them: cnq imatrix without --hessian, cnq build --rounding plain."
        )
    found.save()
    found.save_tokens(tokens)
    return found


def slices(statistics: Statistics, memory: int) -> list[list[int]]:
    """Numbers of missing inputs, in the order of the graph, that fit into `memory` bytes together."""
    parts: list[list[int]] = []
    taken = memory + 1
    for number in statistics.missing:
        one = statistics.inputs[number]
        if one.nbytes > memory:
            raise NoSpace(
                f"{decimal(one.nbytes)} of memory needed for the statistics of {one.name}, {decimal(memory)} given. "
                "Close other programs, raise --hessian-memory, or round without: cnq build --rounding plain."
            )
        taken += one.nbytes
        if taken > memory:
            parts.append([])
            taken = one.nbytes
        parts[-1].append(number)
    return parts


def default_memory(gguf: Path) -> int:
    """Bytes for sums: what is free beside the model's own weights and room to work; at least a quarter of what is free."""
    free = free_memory()
    return max(free - gguf.stat().st_size - _ROOM, free // 4)
