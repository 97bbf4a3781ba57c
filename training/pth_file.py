"""Writing a file that torch.load reads, one tensor in memory at a time: torch.save wants them all.

Format: a zip of stored records, as torch.save has written it since 1.6 (torch/serialization.py, _save; caffe2/serialize/
inline_container.cc): data.pkl names tensors and describes their storages, data/0, data/1, … are the storages' bytes.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnq.checkpoint.checkpoint import Entry
from cnq.gguf_file import BF16, F16, F32

_ALIGNMENT = 64  # bytes, of a storage in the file
_LARGE = 1 << 30  # bytes, from which on a record's sizes are written in 64 bits
_STORAGES = {F32: torch.FloatStorage, F16: torch.HalfStorage, BF16: torch.BFloat16Storage}


class PthFile:
    """A .pth being written: `add` every tensor of `entries`, in their order. The same tensors give the same bytes."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, entries: dict[str, Entry]):
        self._archive, self._stem = archive, path.stem
        self._waiting = deque(entries.items())
        self._n = 0
        self._record("data.pkl", _pickled(entries))
        self._record("byteorder", b"little")

    def add(self, name: str, chunks: Iterable[np.ndarray], wrote: Callable[[int], object]) -> None:
        """Write the next tensor, a few rows at a time; `wrote` hears how many bytes were written each time."""
        expected, entry = self._waiting.popleft()
        assert name == expected
        with self._opened(f"data/{self._n}", entry.nbytes) as out:
            for chunk in chunks:
                out.write(chunk.data.cast("B"))
                wrote(chunk.nbytes)
        self._n += 1

    def finish(self) -> None:
        assert not self._waiting
        self._record("version", b"3\n")

    def _record(self, name: str, content: bytes) -> None:
        with self._opened(name, len(content)) as out:
            out.write(content)

    def _opened(self, name: str, nbytes: int) -> Any:
        """A record to write to, whose content begins at a round place: torch.load(mmap=True) wants no unaligned numbers."""
        large = nbytes >= _LARGE
        info = zipfile.ZipInfo(f"{self._stem}/{name}")  # of 1980: no time gets into the file
        assert self._archive.fp
        at = self._archive.fp.tell() + 30 + len(info.filename.encode()) + (20 if large else 0) + 4
        padding = -at % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        return self._archive.open(info, "w", force_zip64=large)


@contextmanager
def writing(path: Path, entries: dict[str, Entry]) -> Iterator[PthFile]:
    """Write `path`, a state dict of `entries`; it is complete when the block ends well."""
    with zipfile.ZipFile(path, "w") as archive:
        file = PthFile(archive, path, entries)
        yield file
        file.finish()


class _Storage:
    def __init__(self, kind: type, key: str, n: int):
        self.persistent = ("storage", kind, key, "cpu", n)


class _Described:
    """Pickled as torch pickles a contiguous tensor that has its storage to itself."""

    def __init__(self, entry: Entry, key: str):
        self.entry, self.storage = entry, _Storage(_STORAGES[entry.type], key, prod(entry.shape))

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.entry.shape
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> Any:
        return value.persistent if isinstance(value, _Storage) else None


def _pickled(entries: dict[str, Entry]) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump({name: _Described(entry, str(i)) for i, (name, entry) in enumerate(entries.items())})
    return out.getvalue()
