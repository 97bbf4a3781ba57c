"""Importance matrices on disk: the GGUF form of llama-imatrix, and the legacy .dat.

Formats: llama.cpp tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp (vendored by llama-cpp-python 0.3.36).
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import GgufError, listed
from .gguf_file import F32, MAGIC, GgufFile

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """How strongly each input of each matrix is driven.

    sums: weight name -> (n_mat, n_cols) float32, Σx² over the tokens seen; n_mat is 1, or the number of experts.
    counts: weight name -> (n_mat,) float32, tokens seen. The legacy form gives passes instead, and sums scaled alike.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int

    def means(self) -> dict[str, np.ndarray]:
        """Weight name -> flat float32 E[x²], what llama.cpp weighs rounding errors with; 1 for an expert never routed to."""
        return {
            name: np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], np.float32(1)).ravel()
            for (name, sums), counts in zip(self.sums.items(), self.counts.values(), strict=True)
        }


def read_imatrix(path: Path) -> Importance:
    """Read either form. Raises GgufError: no imatrix, cut short, not finite."""
    try:
        with path.open("rb") as f:
            start = f.read(4)
    except OSError as error:
        raise GgufError(f"{path} cannot be read: {error.strerror}.") from None
    importance = _read_gguf(path) if start == MAGIC else _read_dat(path)
    bad = [name for name, sums in importance.sums.items() if not (np.isfinite(sums).all() and (sums >= 0).all())]
    bad += [name for name, counts in importance.counts.items() if not (np.isfinite(counts).all() and (counts >= 0).all())]
    if bad:
        raise GgufError(f"{path}: not finite or negative for {listed(bad)}. Compute the importance matrix again.")
    return importance


def _read_gguf(path: Path) -> Importance:
    file = GgufFile(path)
    names = [t.removesuffix(SUMS) for t in file.tensors if t.endswith(SUMS)]
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        if key not in file.fields:
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
            raise GgufError(f"{path}: sums and counts of {name} do not fit together.")
        sums[name] = total.data.reshape(seen.data.size, -1)
        counts[name] = np.rint(seen.data.ravel())
    datasets = file.fields["imatrix.datasets"]
    return Importance(sums, counts, tuple(datasets), file.fields["imatrix.chunk_count"], file.fields["imatrix.chunk_size"])


def _read_dat(path: Path) -> Importance:
    """i32 entries; per entry i32 length, name, i32 passes, i32 values, f32[values]; then i32 chunks, i32 length, dataset."""
    data = path.read_bytes()
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
        raise GgufError(f"{path} is neither a GGUF nor a legacy importance matrix, or is cut short ({error}).") from None
    return Importance(sums, counts, datasets, n_chunks, 0)
