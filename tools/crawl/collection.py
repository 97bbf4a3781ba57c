"""Alpaca json that grows: what a kill leaves lies in a journal beside it, from which the next run goes on."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cnq.corpus import read_source
from cnq.errors import CnqError, CorpusError
from cnq.files import locked, replacing

from .items import Item
from .similar import Seen

_BUSY = "{} is being written by another crawl. Wait for it, or name another output."


class Collection:
    """Records of `path` and of the journal. before: how many there were at the start. Make it with `opened`."""

    def __init__(self, path: Path, threshold: float):
        self.path, self._journal_path = path, journal_of(path)
        self._seen = Seen(threshold)
        self.records = _read(path) if path.exists() else []
        for record in self.records:
            self._seen.add(_text(record))
        self._written = len(self.records)
        self._journal = _whole_lines(self._journal_path)
        try:
            for items in _journaled(self._journal_path):
                self.records += [record for record in items if self._seen.add(_text(record))]
        except BaseException:
            self._journal.close()
            raise
        self.before = len(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def add(self, items: Sequence[Item]) -> int:
        """Keep the items that are like none before them, on the disk at once: how many."""
        new = [record for record in (item.model_dump() for item in items) if self._seen.add(_text(record))]
        if new:
            self._journal.write(json.dumps(new, ensure_ascii=False).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
            self.records += new
        return len(new)

    def write(self) -> None:
        """Write the whole Alpaca json; after that the journal is not needed."""
        if len(self.records) > self._written:
            with replacing(self.path, force=True) as partial:
                partial.write_text(json.dumps(self.records, ensure_ascii=False, indent=1), encoding="utf-8")
            self._written = len(self.records)
        self._journal.truncate(0)

    def close(self) -> None:
        empty = self._journal.seek(0, os.SEEK_END) == 0
        self._journal.close()
        if empty:
            self._journal_path.unlink()


@contextmanager
def opened(path: Path, threshold: float) -> Iterator[Collection]:
    """The collection in `path`, there or not; at the end, whatever it is, the json is written.

    Raises CorpusError (the file is no Alpaca json, the journal is damaged), CnqError (another crawl has it, not writable).
    """
    if path.suffix != ".json" or path.is_dir():
        raise CnqError(f"{path} is no name for Alpaca json. Name a file that ends in .json.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(journal_of(path), _BUSY.format(path)):
            collection = Collection(path, threshold)
            try:
                yield collection
            finally:
                try:
                    collection.write()
                finally:
                    collection.close()
    except OSError as error:
        raise CnqError(f"{path} cannot be written: {error.strerror or error}. Name another output.") from error


def journal_of(path: Path) -> Path:
    return path.with_name(path.name + ".journal.jsonl")


def _text(record: dict[str, Any]) -> str:
    """What makes a record another one: the same request about other material is new, another answer to the same is not."""
    return f"{record['instruction']}\n{record.get('input') or ''}"


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of an Alpaca json, with whatever else they hold."""
    read_source(path, render=lambda messages: "x")  # no list, GBK, no conversations: said there
    records = json.loads(path.read_text(encoding="utf-8-sig"))
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("instruction"), str) or "output" not in record:
            raise CorpusError(f"{path}: record {number} has no instruction and output. Only Alpaca json can be added to.")
    return records


def _whole_lines(path: Path) -> IO[bytes]:
    """The journal, opened for appending, without the line that a kill cut."""
    file = path.open("ab+")
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    return file


def _journaled(path: Path) -> Iterator[list[dict[str, Any]]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            yield [Item.model_validate(record).model_dump() for record in json.loads(line)]
        except (ValueError, TypeError):  # pydantic's are ValueErrors too
            raise CorpusError(f"{path}: line {number} is damaged. Delete that line; the others are whole.") from None
