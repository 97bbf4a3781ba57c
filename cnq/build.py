"""The whole road: model → checkpoint → F16 GGUF → importance matrix → quantized GGUFs → Modelfile, resumed where it stopped.

Beside each output stands <output>.made.json: what it was made from. A step whose record still holds is skipped.
"""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import psutil

from . import catalog, corpus
from .convert import convert
from .corpus import Chunks, peoples_daily
from .engine.model import Model
from .errors import NoSpace
from .files import decimal, replacing, require_space, sha256
from .gguf_file import GgufFile
from .imatrix import collect
from .ollama import write_modelfile
from .quantize import ALIASES, quantize
from .to_hf import to_hf

RECORD = ".made.json"
_ROUNDED_ALIKE = ("Q8_0", "F16", "BF16", "F32")  # an importance matrix changes nothing in these
N_CTX = 512  # tokens of a chunk, llama-imatrix's and llama-perplexity's own


class Report(Protocol):
    """What a build tells while it works."""

    def skipped(self, path: Path) -> None: ...

    def say(self, text: str) -> None: ...

    def bar(self, what: str, unit: str) -> AbstractContextManager[Callable[[int, int], object]]:
        """A progress bar: gives a function of (done, total) in `unit`, "bytes" or "tensors"."""
        ...


@dataclass(frozen=True)
class Made:
    """One GGUF of a build. seconds: None when it was there already."""

    path: Path
    type: str
    bits_per_weight: float
    nbytes: int
    seconds: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    model: str
    files: tuple[Made, ...]
    modelfile: Path
    format: str | None
    question: str

    @property
    def result(self) -> Path:
        """The last file asked for: what a chat starts with."""
        return self.files[-1].path


def build(
    model: str,
    types: Iterable[str],
    *,
    out: Path | None = None,
    format: str | None = None,
    dtype: str = "f16",
    chunks: int = 100,
    threads: int = 0,
    report: Report,
) -> Built:
    """Take MODEL the whole road and leave everything in `out` (default: models/<name>).

    model: a catalog name, a path or a hub id. types: names of llama.cpp's quantizations. format: of the prompt, for a model
    whose checkpoint has no chat template; default: the catalog's. dtype: of the float GGUF. chunks: of 512 tokens of Chinese
    text for the importance matrix; 0 = round without one.
    Raises what the steps raise, and NoSpace before the first of them.
    """
    entry = catalog.find(model)
    folder = out or Path("models") / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    _require_room(entry, folder)
    source = catalog.fetch(entry, folder / "source", report.say)
    if source.is_file():
        source = _restored(source, folder / "hf", report)
    float_gguf = folder / f"{entry.title}-{dtype.upper()}.gguf"
    template = format or entry.prompt
    made = [_converted(source, float_gguf, dtype, entry.title, template, report)]
    _require_memory(float_gguf)
    imatrix = _calibrated(float_gguf, folder / f"{entry.title}.imatrix.gguf", chunks, threads, report) if chunks else None
    for type in types:
        made.append(_quantized(float_gguf, imatrix, folder, entry.title, type, threads, report))
    modelfile = write_modelfile(made[-1].path, folder / "Modelfile", format=format, force=True)
    for note in modelfile.notes:
        report.say(note)
    return Built(entry.name, tuple(made), modelfile.path, modelfile.format, entry.question)


def _require_room(entry: catalog.Model, folder: Path) -> None:
    """The float GGUF and a Q4_K_M beside the checkpoint; exact sizes are checked again at each step."""
    if entry.path and entry.path.is_dir():
        need = sum(f.stat().st_size for f in entry.path.glob("*") if f.suffix in (".safetensors", ".bin"))
    else:
        need = 2 * (entry.params or 0)
    done = sum(f.stat().st_size for f in folder.glob("*.gguf"))
    require_space(folder, max(0, int(need * 1.35) - done))


def _require_memory(gguf: Path) -> None:
    """llama.cpp decodes one tensor at a time to float32 while it quantizes."""
    largest = max(t.n_elements for t in GgufFile(gguf).tensors.values())
    need, free = largest * 6, psutil.virtual_memory().available
    if free < need:
        raise NoSpace(f"{decimal(need)} of memory needed to quantize {gguf.name}, {decimal(free)} free. Close other programs.")


def _restored(gguf: Path, folder: Path, report: Report) -> Path:
    def work() -> tuple[str, ...]:
        with report.bar(f"{gguf.name} → {folder.name}/", "bytes") as progress:
            to_hf(gguf, folder, force=True, progress=progress)
        return ()

    _step(folder, [gguf], {}, work, report)
    return folder


def _converted(source: Path, dst: Path, dtype: str, name: str, format: str | None, report: Report) -> Made:
    def work() -> tuple[str, ...]:
        with report.bar(f"converting to {dtype.upper()}", "bytes") as progress:
            return convert(source, dst, dtype=dtype, name=name, format=format, force=True, progress=progress).notes

    inputs = [f for f in sorted(source.iterdir()) if f.is_file()]
    seconds, notes = _step(dst, inputs, {"dtype": dtype, "name": name, "format": format}, work, report)
    return Made(dst, dtype.upper(), GgufFile(dst).bits_per_weight, dst.stat().st_size, seconds, notes)


def _calibrated(src: Path, dst: Path, chunks: int, threads: int, report: Report) -> Path:
    """The importance matrix, from the calibration half of the default corpus."""

    def text(model: Model) -> Chunks:
        source = peoples_daily("calibration")
        tokenize = partial(model.tokenize, add_special=True, parse_special=False)
        return corpus.chunks([source], tokenize, N_CTX, chunks, "calibration")

    def work() -> tuple[str, ...]:
        with report.bar("calibrating", "chunks") as progress:
            return collect(src, text, dst, n_ctx=N_CTX, threads=threads, force=True, progress=progress).notes

    _step(dst, [src], {"chunks": chunks, "n_ctx": N_CTX}, work, report)
    return dst


def _quantized(src: Path, imatrix: Path | None, folder: Path, title: str, type: str, threads: int, report: Report) -> Made:
    type = ALIASES.get(type.upper(), type.upper())
    imatrix = None if type in _ROUNDED_ALIKE else imatrix
    dst = folder / f"{title}-{type}{'-im' if imatrix else ''}.gguf"

    def work() -> tuple[str, ...]:
        with report.bar(f"quantizing to {type}", "tensors") as progress:
            done = quantize(
                src, dst, type, imatrix=imatrix, threads=threads, force=True, progress=lambda _, i, n: progress(i, n)
            )
            return done.notes

    inputs = [src, imatrix] if imatrix else [src]
    seconds, notes = _step(dst, inputs, {"type": type}, work, report)
    return Made(dst, type, GgufFile(dst).bits_per_weight, dst.stat().st_size, seconds, notes)


def _step(
    output: Path, inputs: list[Path], options: dict[str, Any], work: Callable[[], tuple[str, ...]], report: Report
) -> tuple[float | None, tuple[str, ...]]:
    """Do the work unless its output is up to date: (seconds, notes); seconds None = skipped, notes then the record's."""
    if (record := _current_record(output, inputs, options)) is not None:
        report.skipped(output)
        return None, tuple(record["notes"])
    started = time.perf_counter()
    notes = work()
    content = {
        "inputs": {p.name: {"stamp": _stamp(p), "sha256": sha256(p)} for p in inputs},
        "options": options,
        "versions": _versions(),
        "notes": notes,
        "output": _stamp(output),
    }
    with replacing(_record_path(output), force=True) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return time.perf_counter() - started, notes


# Records


def _record_path(output: Path) -> Path:
    return output.with_name(output.name + RECORD)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("cnq", "llama-cpp-python", "gguf")}


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _current_record(output: Path, inputs: list[Path], options: dict[str, Any]) -> dict[str, Any] | None:
    """The record of `output`, if it was made from these inputs, with these options and versions, and not touched since.

    An input with the size and time of the record is taken to be the same; with another time its digest decides.
    """
    try:
        record = json.loads(_record_path(output).read_text(encoding="utf-8"))
        known = record["inputs"]
        same = (
            record["output"] == _stamp(output)
            and record["options"] == options
            and record["versions"] == _versions()
            and known.keys() == {p.name for p in inputs}
            and all(
                known[p.name]["stamp"] == _stamp(p)
                or (known[p.name]["stamp"][0] == p.stat().st_size and known[p.name]["sha256"] == sha256(p))
                for p in inputs
            )
        )
    except (OSError, ValueError, KeyError, TypeError):  # no record, or a damaged one
        return None
    return record if same else None
