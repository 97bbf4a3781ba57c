"""Second moments of the inputs of matrices on disk, in a folder beside the importance matrix: `<imatrix>.hessian/`.

manifest.json says whose they are and lists the inputs; `<number>.npy` holds what is known of an input, complete or absent: the
sum over the rows to fit to, of which the blocks on and above the diagonal are kept, and a sketch of the rows held back, which
are there to judge by. That is a little more than half of one symmetric matrix. tokens.npy holds the text, for rounding that
runs it again.
"""

import hashlib
import json
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .errors import StatisticsError, listed
from .files import replacing
from .gguf_file import GgufFile

FOLDER = ".hessian"
_MANIFEST, _TOKENS = "manifest.json", "tokens.npy"
_FORMAT = 1
_BLOCK = 256  # rows of a block
SKETCH = 512  # rows of a sketch: ‖S x‖² is right within 6 % for a single error, and closer for the sum over a matrix's rows
HELD_EVERY = 5  # of five chunks the last is held back; odd, so that two texts in turns both are
MIN_FIT, MIN_HELD = 256, 64  # rows; an expert may see few tokens, and what it saw few of is no measure of it


def beside(imatrix: Path) -> Path:
    """The folder of the statistics that go with an importance matrix."""
    return imatrix.with_name(imatrix.name + FOLDER)


def manifest_path(folder: Path) -> Path:
    return folder / _MANIFEST


# Packed symmetric matrices


def packed_size(columns: int) -> int:
    """Numbers that are kept of a symmetric matrix (columns, columns)."""
    return sum((min(start + _BLOCK, columns) - start) * (columns - start) for start in range(0, columns, _BLOCK))


def block_rows(packed: np.ndarray, columns: int) -> Iterator[tuple[int, np.ndarray]]:
    """The first row of each block, and a view of those rows from the diagonal on: (up to 256, columns - first)."""
    at = 0
    for start in range(0, columns, _BLOCK):
        height = min(_BLOCK, columns - start)
        size = height * (columns - start)
        yield start, packed[at : at + size].reshape(height, columns - start)
        at += size


def add_outer(packed: np.ndarray, x: np.ndarray, pool: Executor) -> None:
    """Add Σ x xᵀ over the rows of x (n, columns) float32. The same products whatever the threads of the pool."""

    def add(block: tuple[int, np.ndarray]) -> None:
        start, rows = block
        rows += x[:, start : start + len(rows)].T @ x[:, start:]

    deque(pool.map(add, block_rows(packed, x.shape[1])), 0)


def add_product(total: np.ndarray, a: np.ndarray, b: np.ndarray, pool: Executor) -> None:
    """Add aᵀ b: a (n, rows), b (n, columns). The same products whatever the threads of the pool."""

    def add(start: int) -> None:
        own = slice(start, start + _BLOCK)
        total[:, own] += a.T @ b[:, own]

    deque(pool.map(add, range(0, b.shape[1], _BLOCK)), 0)


def unpacked(packed: np.ndarray, columns: int) -> np.ndarray:
    """The whole symmetric matrix: (columns, columns) float32."""
    full = np.empty((columns, columns), np.float32)
    for start, rows in block_rows(packed, columns):
        stop = start + len(rows)
        full[start:stop, start:] = rows
        full[stop:, start:stop] = full[start:stop, stop:].T
        corner = full[start:stop, start:stop]
        below = np.tril_indices(len(rows), -1)
        corner[below] = corner.T[below]  # the two halves of a product differ in their last bits
    return full


def is_held(chunk: int) -> bool:
    """Whether a chunk is held back, to judge by."""
    return chunk % HELD_EVERY == HELD_EVERY - 1


def signs(chunk: int, n_tokens: int) -> np.ndarray:
    """(n_tokens, SKETCH) float32: ± 1/√SKETCH, the same whenever the chunk is run."""
    drawn = np.random.default_rng(chunk).integers(0, 2, (n_tokens, SKETCH), np.int8)
    return (2 * drawn - 1).astype(np.float32) * np.float32(SKETCH**-0.5)


def parts(numbers: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of what a file holds: the packed sum, and the sketch (SKETCH, columns)."""
    size = packed_size(columns)
    return numbers[:size], numbers[size:].reshape(SKETCH, columns)


# The folder


@dataclass(frozen=True)
class Input:
    """What some matrices are multiplied with. weights: their names, in the order of the model. expert: of stacks of matrices,
    the one that is meant. n_fit, n_held: rows seen, None = not collected yet. checksum: CRC-32 of the file's numbers.
    """

    weights: tuple[str, ...]
    expert: int | None
    columns: int
    n_fit: int | None = None
    n_held: int | None = None
    checksum: int | None = None

    @property
    def name(self) -> str:
        return self.weights[0] if self.expert is None else f"{self.weights[0]}, expert {self.expert}"

    @property
    def enough(self) -> bool:
        """Whether so many rows were seen that there is something to fit to, and to judge by."""
        return (self.n_fit or 0) >= MIN_FIT and (self.n_held or 0) >= MIN_HELD

    @property
    def nbytes(self) -> int:
        """Of its sum and its sketch."""
        return 4 * (packed_size(self.columns) + SKETCH * self.columns)


@dataclass(frozen=True)
class Source:
    """What statistics are of. model: fingerprint of the GGUF. text: digest of the tokens, as they were run. held_every: of so
    many chunks the last is held back. datasets: names of the texts."""

    model: str
    text: str
    n_ctx: int
    n_chunks: int
    held_every: int
    datasets: tuple[str, ...]


@dataclass(frozen=True)
class Moments:
    """fit: Σ x xᵀ over the rows x to fit to, (columns, columns) float32. held: S X of the rows X held back, (SKETCH, columns)
    float32, with random signs S: heldᵀ held is Σ x xᵀ over them on average (Johnson-Lindenstrauss; Achlioptas, JCSS 66, 2003).
    """

    fit: np.ndarray
    held: np.ndarray
    n_fit: int
    n_held: int


class Statistics:
    """A folder of second moments, complete or not."""

    def __init__(self, folder: Path, source: Source, inputs: tuple[Input, ...]):
        self.folder, self.source, self.inputs = folder, source, inputs
        self._places = {(w, i.expert): n for n, i in enumerate(inputs) for w in i.weights}

    @property
    def missing(self) -> list[int]:
        """Numbers of the inputs that are not collected yet."""
        return [n for n, i in enumerate(self.inputs) if i.n_fit is None]

    @cached_property
    def digest(self) -> str:
        """sha256 of the manifest, and through its checksums of all the sums."""
        return hashlib.sha256(_written(self.source, self.inputs).encode()).hexdigest()

    def find(self, weight: str, expert: int | None = None) -> int | None:
        """The number of the input of a matrix; None when there is none."""
        return self._places.get((weight, expert))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05}.npy"

    def put(self, sums: dict[int, tuple[np.ndarray, int, int]]) -> "Statistics":
        """Write what is known of inputs: number -> (`numbers` as of an Input, rows to fit to, rows held back)."""
        inputs = list(self.inputs)
        for number, (numbers, n_fit, n_held) in sums.items():
            with replacing(self.path(number), force=True, need=numbers.nbytes) as partial, partial.open("wb") as f:
                np.save(f, numbers, allow_pickle=False)
            inputs[number] = replace(inputs[number], n_fit=n_fit, n_held=n_held, checksum=zlib.crc32(numbers.data))
        done = Statistics(self.folder, self.source, tuple(inputs))
        done.save()
        return done

    def save(self) -> None:
        with replacing(manifest_path(self.folder), force=True) as partial:
            partial.write_text(_written(self.source, self.inputs), encoding="utf-8")

    def save_tokens(self, tokens: np.ndarray) -> None:
        """tokens: (n_chunks, n_ctx) int32, as they were run."""
        with replacing(self.folder / _TOKENS, force=True) as partial, partial.open("wb") as f:
            np.save(f, tokens, allow_pickle=False)

    def tokens(self) -> np.ndarray:
        """What save_tokens wrote. Raises StatisticsError: not there, or not the text that the sums are of."""
        path = self.folder / _TOKENS
        try:
            tokens = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StatisticsError(f"{path} cannot be read: {error}. Run cnq imatrix --hessian again.") from None
        shape = (self.source.n_chunks, self.source.n_ctx)
        if (tokens.dtype, tokens.shape, digest_of(tokens)) != (np.int32, shape, self.source.text):
            raise StatisticsError(f"{path} is not the text of these statistics. Run cnq imatrix --hessian again.")
        return np.asarray(tokens)

    def read(self, number: int) -> Moments:
        """The moments of an input. Raises StatisticsError: not there, cut short, or changed since they were written."""
        known, path = self.inputs[number], self.path(number)
        again = f"Delete {self.folder} and compute it again: cnq imatrix --hessian"
        try:
            numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StatisticsError(f"{path}, the statistics of {known.name}, cannot be read: {error}. {again}") from None
        if (numbers.dtype, numbers.nbytes, numbers.ndim) != (np.float32, known.nbytes, 1):
            raise StatisticsError(f"{path} holds no statistics of {known.columns} columns for {known.name}. {again}")
        if zlib.crc32(numbers.data) != known.checksum:
            raise StatisticsError(f"{path}, the statistics of {known.name}, is damaged: its checksum differs. {again}")
        packed, held = parts(numbers, known.columns)
        return Moments(unpacked(packed, known.columns), np.array(held), known.n_fit or 0, known.n_held or 0)


def _written(source: Source, inputs: tuple[Input, ...]) -> str:
    content = {"format": _FORMAT, "source": asdict(source), "inputs": [asdict(i) for i in inputs]}
    return json.dumps(content, ensure_ascii=False, indent=1)


def read_statistics(folder: Path) -> Statistics:
    """What a folder says it holds; the sums are read when asked for. Raises StatisticsError."""
    path = manifest_path(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        source = Source(**content["source"] | {"datasets": tuple(content["source"]["datasets"])})
        inputs = tuple(Input(**i | {"weights": tuple(i["weights"])}) for i in content["inputs"])
        if bad := [i for i in inputs if not (isinstance(i.columns, int) and i.columns > 0 and i.weights)]:
            raise ValueError(f"{len(bad)} inputs without columns or weights")
    except OSError as error:
        raise StatisticsError(f"{path} cannot be read: {error.strerror}. Compute it: cnq imatrix --hessian") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StatisticsError(f"{path} is damaged ({error}). Delete {folder} and run cnq imatrix --hessian again.") from None
    return Statistics(folder, source, inputs)


def between_bytes(file: GgufFile, statistics: "Statistics") -> int:
    """The disk that sequential rounding takes besides its result: a layer, its inputs over the text, and its hidden states."""
    columns: dict[str, int] = {}
    layers: dict[str, int] = {}
    for one in statistics.inputs:
        if one.expert is None:
            layer = _layer_of(one.weights[0])
            columns[layer] = columns.get(layer, 0) + one.columns
    for name, tensor in file.tensors.items():
        layers[_layer_of(name)] = layers.get(_layer_of(name), 0) + tensor.nbytes
    wide = 2 * file.tensors["token_embd.weight"].shape[-1] + columns.pop("", 0)  # what has no layer goes with the last
    layers.pop("", None)
    tokens = statistics.source.n_chunks * statistics.source.n_ctx
    return max(layers.values(), default=0) + 4 * tokens * (wide + max(columns.values(), default=0))


def _layer_of(name: str) -> str:
    return name.split(".")[1] if name.startswith("blk.") else ""


def digest_of(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()


def is_complete(folder: Path, *, text: bool) -> bool:
    """Whether all the inputs of a model are in a folder; text: and their tokens."""
    try:
        found = read_statistics(folder)
    except StatisticsError:
        return False
    files = [found.path(n) for n in range(len(found.inputs))] + ([folder / _TOKENS] if text else [])
    return not found.missing and all(path.is_file() for path in files)


def complete_statistics(folder: Path, model: str) -> Statistics:
    """The statistics in a folder, which must be whole and of the model with this fingerprint. Raises StatisticsError."""
    found = read_statistics(folder)
    if found.source.model != model:
        raise StatisticsError(
            f"{folder} is of another model or another float file. Give this model's own: cnq imatrix --hessian, or round "
            "without: --rounding plain"
        )
    if found.missing:
        names = listed([found.inputs[n].name for n in found.missing], 3)
        raise StatisticsError(
            f"{folder} is not complete: {len(found.missing)} of {len(found.inputs)} inputs are missing ({names}). "
            "Run cnq imatrix --hessian again: it goes on where it stopped."
        )
    return found
