"""What goes into each matrix: a sample of the inputs of every product, taken while the model reads."""

import ctypes
import zlib
from collections.abc import Iterable

import numpy as np

from ..engine import ggml
from ..errors import EngineError, listed
from ..gguf_file import GgufFile

_SKIPPED = 4  # tokens at a chunk's start: attention dumps what it does not need on them, at a thousand times the usual size
_MEMORY = 512 << 20  # bytes for all samples


def tokens_kept(file: GgufFile, names: Iterable[str], wanted: int) -> int:
    """How many tokens' inputs to keep, at most `wanted`, so that the samples fit into memory. At least 32."""
    widths = sum(file.tensors[name].shape[-1] for name in names)
    return max(32, min(wanted, _MEMORY // (4 * max(1, widths))))


class Sampler:
    """The evaluation callback that keeps, of each chunk, the inputs of some tokens; matrices that share an input share them.

    Of experts' matrices the inputs of all tokens count alike, whichever expert they were sent to.
    """

    def __init__(self, file: GgufFile, names: Iterable[str], per_chunk: int):
        self._wanted, self._file, self._per_chunk = set(names), file, per_chunk
        self._kept: dict[str, list[np.ndarray]] = {}
        self._same: dict[str, str] = {}  # matrix -> the first with the same input
        self._last: tuple[int, str] | None = None
        self._products = (ggml.op("MUL_MAT"), ggml.op("MUL_MAT_ID"))
        self._seed = 0

    def begin(self, chunk: int) -> None:
        self._last, self._seed = None, chunk

    def __call__(self, tensor: ggml.Tensor, ask: bool) -> bool:
        if tensor.op not in self._products:
            return not ask
        inputs = tensor.src[1].contents
        name = tensor.src[0].contents.name.decode("utf-8", "replace")
        if name not in self._wanted or not ggml.is_float32(inputs):
            return not ask
        if ask:
            return True
        node = ctypes.addressof(inputs)
        if self._last and self._last[0] == node:
            self._same[name] = self._last[1]
            return True
        self._last = (node, name)
        self._same[name] = name
        x = ggml.array(inputs).reshape(-1, inputs.ne[0])  # (tokens, or tokens x experts used, columns)
        self._kept.setdefault(name, []).append(x[self._chosen(name, len(x))].copy())
        return True

    def _chosen(self, name: str, n: int) -> np.ndarray:
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        first = min(_SKIPPED, n - 1)
        return first + random.permutation(n - first)[: self._per_chunk]

    def inputs(self) -> dict[str, np.ndarray]:
        """Matrix -> (tokens, columns) float32. Raises EngineError for matrices that met no product."""
        if missing := sorted(self._wanted - self._same.keys()):
            raise EngineError(f"{self._file.path}: no product with {listed(missing)} was seen.")
        whole = {name: np.concatenate(kept) for name, kept in self._kept.items()}
        if bad := [name for name, x in whole.items() if not np.isfinite(x).all()]:
            raise EngineError(f"{listed(bad)}: inputs that are not finite. Convert the model with --dtype bf16 or f32.")
        return {name: whole[first] for name, first in self._same.items()}
