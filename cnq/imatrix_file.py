"""Importance matrices on disk: the GGUF form of llama-imatrix, and the legacy .dat.

Formats: llama.cpp tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp (vendored by llama-cpp-python 0.3.36).
"""

import mmap
import struct
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from .errors import GgufError, listed
from .gguf_file import F32, MAGIC, GgufFile, Planned, write

SUMS, COUNTS = ".in_sum2", ".counts"
INPUTS = ".in_sum"  # proposed in ggml-org/llama.cpp pull request 14891; readers that do not know it pass it over


@dataclass(frozen=True)
class Importance:
    """How strongly each input of each matrix is driven.

    sums: weight name -> (n_mat, n_cols) float32, Σx² over the tokens seen; n_mat is 1, or the number of experts.
    counts: weight name -> (n_mat,) float32, tokens seen. The legacy form gives passes instead, and sums scaled alike.
    inputs: weight name -> (n_mat, n_cols) float32, Σx; empty where a file does not have it.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int
    inputs: dict[str, np.ndarray] = field(default_factory=dict)

    def means(self) -> dict[str, np.ndarray]:
        """Weight name -> flat float32 E[x²], what llama.cpp weighs rounding errors with; 1 for an expert never routed to."""
        return {
            name: np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], np.float32(1)).ravel()
            for (name, sums), counts in zip(self.sums.items(), self.counts.values(), strict=True)
        }


def is_imatrix(path: Path) -> bool:
    """Whether a file is an importance matrix by its own word, or by the .dat of its name."""
    return path.suffix == ".dat" or GgufFile(path).fields.get("general.type") == "imatrix"


def read_imatrix(path: Path) -> Importance:
    """Read either form. Raises GgufError: no imatrix, cut short, not finite."""
    try:
        with path.open("rb") as f:
            start = f.read(4)
    except OSError as error:
        raise GgufError(f"{path} cannot be read: {error.strerror}. Give an importance matrix, GGUF or .dat.") from None
    if not start:
        raise GgufError(f"{path} is empty. Compute the importance matrix again.")
    importance = _read_gguf(path) if start == MAGIC else _read_dat(path)
    bad = [name for name, sums in importance.sums.items() if not (np.isfinite(sums).all() and (sums >= 0).all())]
    bad += [name for name, inputs in importance.inputs.items() if not np.isfinite(inputs).all()]
    bad += [name for name, counts in importance.counts.items() if not (np.isfinite(counts).all() and (counts >= 0).all())]
    if bad:
        raise GgufError(f"{path}: not finite or negative for {listed(bad)}. Compute the importance matrix again.")
    return importance


def _read_gguf(path: Path) -> Importance:
    file = GgufFile(path)
    names = [t.removesuffix(SUMS) for t in file.tensors if t.endswith(SUMS)]
    for key, type in (("imatrix.datasets", list), ("imatrix.chunk_count", int), ("imatrix.chunk_size", int)):
        if not isinstance(file.fields.get(key), type):
            raise GgufError(
                f"{path} has no {key}: it is no importance matrix. Expected the output of cnq imatrix or llama-imatrix."
            )
    if lone := [n for n in names if n + COUNTS not in file.tensors]:
        raise GgufError(f"{path}: sums without counts for {listed(lone)}. Compute the importance matrix again.")
    if not names:
        raise GgufError(f"{path} holds no importance data. Compute the importance matrix again.")
    sums, counts = {}, {}
    for name in names:
        total, seen = file.tensor(name + SUMS), file.tensor(name + COUNTS)
        if total.type != F32 or seen.type != F32 or total.data.size % seen.data.size:
            raise GgufError(f"{path}: sums and counts of {name} do not fit together. Compute the importance matrix again.")
        sums[name] = total.data.reshape(seen.data.size, -1)
        counts[name] = np.rint(seen.data.ravel())
    inputs = {
        name: t.data.reshape(sums[name].shape)
        for name in names
        if name + INPUTS in file.tensors and (t := file.tensor(name + INPUTS)).type == F32 and t.data.size == sums[name].size
    }
    datasets, n_chunks, chunk_size = (file.fields[f"imatrix.{key}"] for key in ("datasets", "chunk_count", "chunk_size"))
    return Importance(sums, counts, tuple(map(str, datasets)), n_chunks, chunk_size, inputs)


def _read_dat(path: Path) -> Importance:
    """i32 entries; per entry i32 length, name, i32 passes, i32 values, f32[values]; then i32 chunks, i32 length, dataset."""
    with path.open("rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)  # somebody may have named the model instead
    at = 0

    def number() -> int:
        nonlocal at
        (value,) = struct.unpack_from("<i", data, at)
        at += 4
        return value

    def piece(length: int) -> bytes:
        nonlocal at
        if not 0 <= length <= len(data) - at:
            raise IndexError(f"{length} bytes at byte {at}")
        at += length
        return data[at - length : at]

    sums, counts = {}, {}
    n_chunks = 0
    datasets: tuple[str, ...] = ()
    try:
        n_entries = number()
        if n_entries < 1:
            raise IndexError(f"{n_entries} entries")
        for _ in range(n_entries):
            name = piece(number()).decode()
            passes = number()
            values = np.frombuffer(piece(4 * number()), np.float32)
            sums[name] = values[None]
            counts[name] = np.array([max(passes, 1)], np.float32)
        if at < len(data):
            n_chunks = number()
            datasets = (piece(number()).decode(),)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise GgufError(
            f"{path} is neither a GGUF nor a legacy importance matrix, or is cut short ({error}). Compute it again."
        ) from None
    return Importance(sums, counts, datasets, n_chunks, 0)


# Writing


def merged(one: Importance, other: Importance) -> Importance:
    """The sums of two runs added. Raises GgufError when they are of different models or of the legacy form."""
    if not other.chunk_size or not one.chunk_size:
        raise GgufError("a legacy .dat does not say how many tokens it saw and cannot be merged. Give the GGUF form.")
    for name in one.sums.keys() & other.sums.keys():
        if one.sums[name].shape != other.sums[name].shape:
            raise GgufError(
                f"{name}: {one.sums[name].shape} values in one, {other.sums[name].shape} in the other: other models."
            )
    names = sorted(one.sums.keys() | other.sums.keys())

    def added(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: a[n] + b[n] if n in a and n in b else a.get(n, b.get(n)) for n in names}  # type: ignore[misc]

    datasets = (*one.datasets, *(d for d in other.datasets if d not in one.datasets))
    inputs = {n: one.inputs[n] + other.inputs[n] for n in names if n in one.inputs and n in other.inputs}
    n_chunks = one.n_chunks + other.n_chunks
    return Importance(added(one.sums, other.sums), added(one.counts, other.counts), datasets, n_chunks, one.chunk_size, inputs)


def write_gguf(path: Path, importance: Importance) -> None:
    """The form that llama-quantize, llama-imatrix and Ollama's tools read: sums and counts as they are, sorted by name."""
    import gguf  # here: who only reads starts sooner

    writer = gguf.GGUFWriter(path=None, arch="")  # an importance matrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(importance.datasets))
    writer.add_uint32("imatrix.chunk_count", importance.n_chunks)
    writer.add_uint32("imatrix.chunk_size", importance.chunk_size)
    tensors = []
    for name, sums in importance.sums.items():
        counts = importance.counts[name][:, None]
        for suffix, data in ((SUMS, sums), (COUNTS, counts), (INPUTS, importance.inputs.get(name))):
            if data is None:
                continue
            tensors.append(Planned(name + suffix, F32, data.shape, partial(_once, np.ascontiguousarray(data, np.float32))))
    write(path, writer, tensors, lambda n: None)


def _once(data: np.ndarray) -> list[np.ndarray]:
    return [data]


def write_dat(path: Path, importance: Importance) -> None:
    """The legacy form: mean times passes, where a pass is a chunk; an expert that saw nothing counts as 1."""
    means = importance.means()
    with path.open("wb") as out:
        out.write(struct.pack("<i", len(means)))
        for name, mean in means.items():
            passes = int(np.ceil(importance.counts[name].max() / max(1, importance.chunk_size)))
            out.write(struct.pack("<i", len(name.encode())) + name.encode() + struct.pack("<ii", passes, mean.size))
            out.write((mean * np.float32(passes)).astype(np.float32).tobytes())
        dataset = (importance.datasets or ("",))[0].encode()
        out.write(struct.pack("<ii", importance.n_chunks, len(dataset)) + dataset)
