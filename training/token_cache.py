"""Tokenised data on disk, complete or absent, known again by all that it was made from."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from datasets import Dataset
from filelock import FileLock

from cnq.files import replacing, sha256

COUNTS = "counts.json"
_ROWS = 1000  # written at once
_LAYOUT = 1  # goes up when what is written for the same input changes
_TYPES = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "bytes": pa.int64()}


class Rows:
    """Rows written one by one to an Arrow file, which `opened` maps into memory."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self._schema = pa.schema([(name, _TYPES[name]) for name in columns])
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)
        self._waiting: list[dict[str, Any]] = []
        self.n = 0

    def add(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        self.n += 1
        if len(self._waiting) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._waiting, self._schema))
        self._waiting = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._waiting:
            self._flush()
        self._writer.close()
        self._file.close()


def opened(path: Path) -> Dataset:
    """What Rows wrote, not in memory."""
    return Dataset.from_file(str(path))


def key(files: Iterable[Path], tokenizer: str, settings: Mapping[str, object]) -> str:
    """Digest of what decides the tokens: the files' bytes in their order, the tokenizer's digest, the settings."""
    made_from = [_LAYOUT, [sha256(file) for file in files], tokenizer, sorted(settings.items())]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def cached(folder: Path, make: Callable[[Path], Mapping[str, int | None]]) -> dict[str, Any]:
    """Have `make` fill `folder`, unless that was done before; returns the counts that it returned.

    Processes that want the same folder wait for the one that makes it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".wait")):
        if not (folder / COUNTS).is_file():
            with replacing(folder, folder=True, force=True) as partial:
                partial.mkdir()
                counts = make(partial)
                (partial / COUNTS).write_text(json.dumps(counts))
    counts = json.loads((folder / COUNTS).read_text())
    assert isinstance(counts, dict)
    return counts
