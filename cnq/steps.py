"""Steps of a build, each done again only when what it was made from has changed.

Beside each output stands <output>.made.json: its inputs, options and versions. A step whose record still holds is skipped.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .files import replacing, sha256

RECORD = ".made.json"


@dataclass(frozen=True)
class Done:
    """What a step leaves in its record besides: notes for the user, facts for later steps."""

    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def step(
    output: Path, inputs: dict[str, Path], options: dict[str, Any], work: Callable[[], Done], skipped: Callable[[Path], object]
) -> tuple[float | None, Done]:
    """Do the work unless its output is up to date: (seconds, what was done); seconds None = skipped, the rest recorded.

    inputs: by the names that the record knows them by, wherever they are. skipped: hears an output that is up to date.
    """
    if (record := _current_record(output, inputs, options)) is not None:
        skipped(output)
        return None, record
    started = time.perf_counter()
    done = work()
    content = {
        "inputs": {name: {"stamp": _stamp(p), "sha256": sha256(p)} for name, p in inputs.items()},
        "options": options,
        "versions": versions(),
        "notes": done.notes,
        "facts": done.facts,
        "output": _stamp(output),
    }
    with replacing(record_path(output), force=True) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return time.perf_counter() - started, done


# Records


def named(*paths: Path) -> dict[str, Path]:
    return {p.name: p for p in paths}


def files_of(place: Path) -> dict[str, Path]:
    """The files of a directory, or the one file."""
    return named(place) if place.is_file() else named(*(f for f in sorted(place.iterdir()) if f.is_file()))


def record_path(output: Path) -> Path:
    return output.with_name(output.name + RECORD)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("cnq", "llama-cpp-python", "gguf")}


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _current_record(output: Path, inputs: dict[str, Path], options: dict[str, Any]) -> Done | None:
    """What the record of `output` says was done, if it was made from these inputs, with these options and versions, and was not
    touched since.

    An input with the size and time of the record is taken to be the same; with another time its digest decides.
    """
    try:
        record = json.loads(record_path(output).read_text(encoding="utf-8"))
        known, done = record["inputs"], Done(tuple(record["notes"]), record["facts"])
        same = (
            record["output"] == _stamp(output)
            and record["options"] == options
            and record["versions"] == versions()
            and known.keys() == inputs.keys()
            and all(
                known[name]["stamp"] == _stamp(p)
                or (known[name]["stamp"][0] == p.stat().st_size and known[name]["sha256"] == sha256(p))
                for name, p in inputs.items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError):  # no record, or a damaged one
        return None
    return done if same else None
