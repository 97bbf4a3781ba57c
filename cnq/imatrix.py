"""Float GGUF + text → importance matrix: Σx² of the inputs of every matrix, through llama.cpp's evaluation callback.

The same sums as llama-imatrix, sooner: each pass ends after the last matrix that is asked for, and inputs that several
matrices share are squared once.
"""

import ctypes
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import hessian as moments
from .corpus import Chunks, Used
from .engine import ggml
from .engine.model import Model
from .errors import EngineError, GgufError, listed
from .files import replacing
from .gguf_file import GgufFile
from .hessian_file import Statistics, beside
from .imatrix_file import Importance, merged, read_imatrix, write_dat, write_gguf
from .tuning import PLAIN

MIN_TOKENS = 16  # llama-imatrix looks at no smaller product
STATE = ".state"


@dataclass(frozen=True)
class Collected:
    """n_tokens: seen in this run. resumed: chunks taken over from an interrupted run. notes: what has no data.

    hessian: the folder of second moments. passes: how often the text was run for them.
    """

    path: Path
    n_entries: int
    n_chunks: int
    n_tokens: int
    resumed: int
    manifest: tuple[Used, ...]
    notes: tuple[str, ...]
    seconds: float
    hessian: Path | None = None
    passes: int = 1


class Collector:
    """Sums over the inputs of matrix products, fed by the evaluation callback.

    wanted: names of the weights. sums, inputs: name -> (n_mat, n_cols) float64, Σx² and Σx; counts: name -> (n_mat,) tokens.
    """

    def __init__(self, file: GgufFile, process_output: bool):
        names = [n for n, t in file.tensors.items() if n.startswith("blk.") and n.endswith(".weight") and len(t.shape) > 1]
        self.wanted = set(names) | ({"output.weight"} & file.tensors.keys() if process_output else set())
        self.file = file
        self.sums: dict[str, np.ndarray] = {}
        self.inputs: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._mul_mat, self._mul_mat_id = ggml.op("MUL_MAT"), ggml.op("MUL_MAT_ID")
        self._checked = False
        self._seen: set[str] = set()  # in this pass
        self._needed: set[str] | None = None  # what a whole pass meets; known after the first chunk
        # The last input (its address as a graph node, since memory is recycled), its squares and itself summed over the tokens.
        self._shared: tuple[int, np.ndarray, np.ndarray] | None = None

    def begin(self) -> None:
        """A new chunk."""
        if self._seen and self._needed is None:
            self._needed = set(self._seen)
        self._seen.clear()
        self._shared = None

    def __call__(self, tensor: ggml.Tensor, ask: bool) -> bool:
        """llama.cpp asks of each product whether its data is wanted, then shows it; False then ends the pass."""
        if tensor.op not in (self._mul_mat, self._mul_mat_id):
            return not ask
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode("utf-8", "replace")
        if name not in self.wanted or not ggml.is_float32(inputs):
            return not ask
        if tensor.op == self._mul_mat and inputs.ne[1] < MIN_TOKENS:
            return not ask
        if ask:
            return True
        if not self._checked:
            ggml.check(weight, self.file.tensors[name])
            self._checked = True
        if tensor.op == self._mul_mat:
            self._dense(name, inputs)
        else:
            self._experts(name, weight, inputs, tensor.src[2].contents)
        self._seen.add(name)
        if self._needed is None or not self._needed <= self._seen:
            return True
        self._seen.clear()  # a chunk may take several passes
        return False

    def _dense(self, name: str, inputs: ggml.Tensor) -> None:
        x = ggml.array(inputs).reshape(-1, inputs.ne[0])  # (tokens, columns)
        node = ctypes.addressof(inputs)
        if self._shared is None or self._shared[0] != node:
            self._shared = node, np.einsum("ij,ij->j", x, x), x.sum(0)
        _, squares, total = self._shared
        self._add(name, squares[None], total[None], np.array([len(x)]))

    def _experts(self, name: str, weight: ggml.Tensor, inputs: ggml.Tensor, ids: ggml.Tensor) -> None:
        x = ggml.array(inputs)[0]  # (tokens, 1 or experts used, columns)
        chosen = ggml.array(ids, np.int32)[0, 0]  # (tokens, experts used)
        n_mat, columns = weight.ne[2], x.shape[-1]
        sums, total, counts = np.zeros((n_mat, columns)), np.zeros((n_mat, columns)), np.zeros(n_mat, np.int64)
        for expert in range(n_mat):
            token, slot = np.nonzero(chosen == expert)
            rows = x[token, slot % x.shape[1]]
            sums[expert] = np.einsum("ij,ij->j", rows, rows)
            total[expert] = rows.sum(0)
            counts[expert] = len(rows)
        self._shared = None
        self._add(name, sums, total, counts)

    def _add(self, name: str, sums: np.ndarray, inputs: np.ndarray, counts: np.ndarray) -> None:
        if not np.isfinite(sums).all():
            raise EngineError(
                f"{name}: its inputs are not finite. The model overflows float16, or is damaged: "
                "convert it with --dtype bf16 or f32."
            )
        if name in self.sums:
            self.sums[name] += sums
            self.inputs[name] += inputs
            self.counts[name] += counts
        else:
            self.sums[name], self.inputs[name] = sums.astype(np.float64), inputs.astype(np.float64)
            self.counts[name] = counts.astype(np.int64)

    def importance(self, datasets: tuple[str, ...], n_chunks: int, chunk_size: int) -> Importance:
        return Importance(
            {name: self.sums[name].astype(np.float32) for name in sorted(self.sums)},
            {name: self.counts[name].astype(np.float32) for name in sorted(self.sums)},
            datasets,
            n_chunks,
            chunk_size,
            {name: self.inputs[name].astype(np.float32) for name in sorted(self.sums)},
        )


def collect(
    gguf: Path,
    text: Callable[[Model], Chunks],
    dst: Path,
    *,
    n_ctx: int = 512,
    n_batch: int = 512,
    process_output: bool = False,
    merge: tuple[Path, ...] = (),
    legacy: bool = False,
    save_every: int = 10,
    hessian: bool = False,
    hessian_memory: int = 0,
    threads: int = 0,
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Collected:
    """Run `text` through `gguf` and write the importance matrix to `dst`.

    text: makes the chunks with the model's tokenizer (cnq.corpus). process_output: output.weight too. merge: importance
    matrices to be added. legacy: write .dat instead of GGUF. save_every: chunks between two states on disk, from which an
    interrupted run goes on when model, text and options are the same. hessian: collect second moments too, in the folder
    hessian_file.beside(dst), which outlives an interruption; hessian_memory: bytes for their sums, 0 = what is free; where
    they do not hold all of them, the text runs several times.
    Raises GgufError, CorpusError, EngineError, OutputExists, NoSpace.
    """
    started = time.perf_counter()
    others = [read_imatrix(path) for path in merge]
    file = GgufFile(gguf)
    collector = Collector(file, process_output)
    watching = moments.Watching()
    n_batch = n_ctx if hessian else min(n_batch, n_ctx)  # a pass that ends early must have been the whole chunk's
    tuned = replace(PLAIN, batch=max(PLAIN.batch, n_ctx)) if hessian else PLAIN  # and in one piece
    with replacing(dst, force=force) as partial:
        with Model(gguf, n_ctx=n_ctx, n_batch=n_batch, n_threads=threads, tuned=tuned, watch=watching) as model:
            chunks = text(model)
            datasets = tuple(f"{u.name} sha256:{u.sha256[:16]} {u.chunks} chunks" for u in chunks.manifest)
            state = _State(dst, _key(gguf, chunks, n_ctx, process_output))
            done = state.load(collector)
            statistics, parts = None, []
            if hessian:
                memory = hessian_memory or moments.default_memory(gguf)
                ran = np.array([with_bos(model, tokens) for tokens in chunks.tokens], np.int32)
                statistics = moments.prepare(beside(dst), model, watching, ran, datasets, n_ctx)
                parts = moments.slices(statistics, memory)
            with moments.summing_threads(model.n_threads) as pool:
                _run(model, watching, chunks, collector, state, done, save_every, statistics, parts, pool, progress)
        if not collector.sums:
            raise GgufError(f"{gguf}: no matrix product of blk.* was seen. It is no model that cnq can calibrate.")
        importance = collector.importance(datasets, len(chunks.tokens), n_ctx)
        for other in others:
            importance = merged(importance, other)
        (write_dat if legacy else write_gguf)(partial, importance)
    state.forget()
    return Collected(
        path=dst,
        n_entries=len(importance.sums),
        n_chunks=len(chunks.tokens),
        n_tokens=int(chunks.tokens[done:].size),
        resumed=done,
        manifest=chunks.manifest,
        notes=tuple(_gaps(collector, importance)),
        seconds=time.perf_counter() - started,
        hessian=statistics.folder if statistics else None,
        passes=max(1, len(parts)),
    )


def _run(
    model: Model,
    watching: moments.Watching,
    chunks: Chunks,
    collector: Collector,
    state: "_State",
    done: int,
    save_every: int,
    statistics: Statistics | None,
    parts: list[list[int]],
    pool: Executor,
    progress: Callable[[int, int], object],
) -> None:
    """Run the text: once for the importance matrix, from chunk `done` on, and for each part of the statistics from the start.

    The first part is collected in the passes of the importance matrix.
    """
    n = len(chunks.tokens)
    for number in range(max(1, len(parts))):
        sums = moments.Sums({i: statistics.inputs[i] for i in parts[number]}, pool) if statistics and parts else None
        for i in range(0 if sums else done, n):
            watchers: list[Any] = []
            if sums:
                sums.begin(i, len(chunks.tokens[i]))
                watchers.append(sums)
            if number == 0 and i >= done:
                collector.begin()
                watchers.append(collector)
            watching.use(*watchers)
            model.feed(with_bos(model, chunks.tokens[i]))
            progress(number * n + i + 1, max(1, len(parts)) * n)
            more = i + 1 < n or number + 1 < len(parts)
            if number == 0 and i >= done and more and ((i + 1) % save_every == 0 or i + 1 == n):
                state.save(collector, i + 1)
        if statistics and sums:
            statistics = statistics.put(sums.result())


def with_bos(model: Model, tokens: np.ndarray) -> list[int]:
    """A chunk with its first token replaced by bos, where the model adds one: as llama.cpp's tools run chunks."""
    ids = tokens.tolist()
    if model.adds_bos:
        ids[0] = model.bos
    return ids


def _gaps(collector: Collector, importance: Importance) -> list[str]:
    notes = []
    if missing := sorted(collector.wanted - importance.sums.keys()):
        notes.append(f"no data for {len(missing)} tensors: {listed(missing)}")
    for name, counts in importance.counts.items():
        if idle := [str(i) for i in np.flatnonzero(counts == 0)]:
            notes.append(f"{name}: no token was routed to experts {listed(idle)}; give more text")
    return notes


def _key(gguf: Path, chunks: Chunks, n_ctx: int, process_output: bool) -> str:
    """What a state on disk must agree in to be gone on with."""
    stat = gguf.stat()
    parts = (gguf.name, stat.st_size, stat.st_mtime_ns, n_ctx, process_output)
    return hashlib.sha256(json.dumps(parts).encode() + chunks.tokens.tobytes()).hexdigest()


class _State:
    """The sums of an unfinished run, beside its output: exact, in float64."""

    def __init__(self, dst: Path, key: str):
        self.path = dst.with_name(dst.name + STATE)
        self.key = key

    def save(self, collector: Collector, n_chunks: int) -> None:
        kinds = {"sums": collector.sums, "inputs": collector.inputs, "counts": collector.counts}
        arrays = {f"{kind}/{name}": array for kind, found in kinds.items() for name, array in found.items()}
        with replacing(self.path, force=True) as partial, partial.open("wb") as f:
            np.savez(f, allow_pickle=False, **{"key": np.array(self.key), "chunks": np.array(n_chunks)}, **arrays)

    def load(self, collector: Collector) -> int:
        """Fill the collector; returns how many chunks it has, 0 when there is no state that fits."""
        try:
            with np.load(self.path, allow_pickle=False) as data:
                if str(data["key"]) != self.key:
                    return 0
                for kind in ("sums", "inputs", "counts"):
                    found = {n.removeprefix(f"{kind}/"): data[n] for n in data.files if n.startswith(f"{kind}/")}
                    setattr(collector, kind, found)
                return int(data["chunks"])
        except (OSError, ValueError, KeyError):  # none, or cut short
            return 0

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
