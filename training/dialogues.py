"""Conversations to learn from, read and checked before any model is loaded.

What files may hold is in cnq/records.py, which reads text for calibration from the same files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnq import records
from cnq.errors import CorpusError, listed
from cnq.records import Record


@dataclass(frozen=True)
class Dialogues:
    """items: conversations that end with an answer, and texts. files: what they were read from.

    empty_answers: conversations left out for an answer without text. unanswered: those left out for want of any answer.
    """

    items: tuple[Record, ...]
    files: tuple[Path, ...]
    empty_answers: int
    unanswered: int


def read(paths: Sequence[Path]) -> Dialogues:
    """All records of `paths`, files or folders of .json, .jsonl and .parquet. What follows the last answer is left off.

    Raises CorpusError, which names file and record: what cnq.records refuses, or nothing to learn.
    """
    files = records.files(paths, records.SUFFIXES)
    items, empty, unanswered = [], 0, 0
    for record in (record for file in files for record in records.records(file)):
        if record.text is not None:
            items.append(record)
            continue
        answers = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
        if not answers:
            unanswered += 1
        elif not all(record.messages[i]["content"].strip() for i in answers):
            empty += 1
        else:
            items.append(Record(record.where, record.messages[: answers[-1] + 1]))
    if not items:
        raise CorpusError(
            f"there is nothing to learn in {listed(str(f) for f in files)}: {empty} conversations have an answer without text, "
            f"{unanswered} have none. Expected {records.EXPECTED}."
        )
    return Dialogues(tuple(items), tuple(files), empty, unanswered)
