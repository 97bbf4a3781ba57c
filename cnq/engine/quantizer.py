"""llama_model_quantize in a process of its own: an abort of native code becomes one error, Ctrl-C leaves nothing running.

The parent writes one JSON request to the child's stdin and keeps it open: its end tells the child that the parent is
gone, however it went. The child answers with one JSON object a line.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import QuantizeError
from ..gguf_file import TYPE_BY_NAME, TYPES, TensorType
from ..imatrix_file import read_imatrix

_MAX_KV = 127  # bytes of a string in llama_model_kv_override


@dataclass(frozen=True)
class Request:
    """llama_model_quantize_params. tensor_types: (C++ regular expression, type name), the first match counts."""

    src: str
    dst: str
    ftype: int
    imatrix: str | None = None
    tensor_types: list[tuple[str, str]] = field(default_factory=list)
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    leave_output: bool = False
    requantize: bool = False
    threads: int = 0
    dry_run: bool = False


@dataclass(frozen=True)
class Choice:
    """What llama.cpp decides for a tensor. wanted: the type it fell back from, because rows do not fill its blocks."""

    name: str
    type: TensorType
    wanted: TensorType | None


def ftypes() -> dict[str, int]:
    """Every quantization the linked llama.cpp offers: name -> llama_ftype, the smallest first."""
    import llama_cpp.llama_cpp as lib

    # llama-ext.h; not in the Python bindings. Numbers that llama.cpp only reads (NVFP4) have no type here.
    default_type = lib._lib["_Z28llama_ftype_get_default_type11llama_ftype"]
    named = re.compile("LLAMA_FTYPE_(?:ALL|MOSTLY)_(.+)")
    found = {m[1]: int(getattr(lib, m[0])) for m in map(named.fullmatch, dir(lib)) if m}
    offered = {name: TYPES[default_type(number)] for name, number in found.items() if default_type(number) in TYPES}
    return {name: found[name] for name in sorted(offered, key=lambda name: (offered[name].bits, found[name]))}


def quantize(request: Request, progress: Callable[[str, int, int], object] = lambda name, i, n: None) -> list[Choice]:
    """Run the request in a child process; for each tensor begun, `progress` hears its name, its number and how many there are.

    Returns what became of each tensor. Raises QuantizeError with llama.cpp's words, or the signal that killed the child;
    OSError when the output cannot be written.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # an abort prints its reason, and does not call a debugger
    )
    assert child.stdin and child.stdout and child.stderr
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr), daemon=True)  # type: ignore[arg-type]
    reader.start()
    choices: list[Choice] = []
    failure: str | None = "llama.cpp ended without an answer"
    try:
        with suppress(BrokenPipeError):  # it is dead already: its exit code will tell
            child.stdin.write(json.dumps(asdict(request)) + "\n")
            child.stdin.flush()
        for line in child.stdout:
            event = json.loads(line)
            if "progress" in event:
                progress(*event["progress"])
            elif "choice" in event:
                name, type, wanted = event["choice"]
                choices.append(Choice(name, TYPE_BY_NAME[type], TYPE_BY_NAME.get(wanted or "")))
            else:
                failure = event["failure"]
        child.wait()
    finally:
        child.kill()
        child.wait()
        reader.join()
        for stream in (child.stdin, child.stdout, child.stderr):
            with suppress(BrokenPipeError):
                stream.close()
    if child.returncode < 0:
        failure = f"llama.cpp was ended by {signal.Signals(-child.returncode).name}. {''.join(errors[-1:]).strip()}"
    elif child.returncode:
        failure = " ".join(" ".join(errors[-3:]).split())
    if failure and "iostream error" in failure:
        _write_on(request.dst)
    if failure:
        raise QuantizeError(f"{request.src} was not quantized: {failure}")
    return choices


def _write_on(path: str) -> None:
    """Raise the OSError that llama.cpp met in writing: std::ofstream does not tell which."""
    with open(path, "ab") as f:  # noqa: PTH123
        f.write(bytes(1 << 20))


# The child's side

_START = re.compile(r"\[ *(\d+)/ *(\d+)\] (\S+) +- \[.*?\], type = *(\S+?),")
_BECOMES = re.compile(r"converting to (\S+) \.\.|\((\S+)\)\s*$")
_FALLBACK = re.compile(r"warning: (\S+) +- ncols .* \(required for type +(\S+?)\).* -> falling back to +(\S+)")


class _Log:
    """llama.cpp tells of its work in its log only: read each line, pass on what the parent wants to know."""

    def __init__(self) -> None:
        self.line = ""
        self.tail: list[str] = []
        self.wanted: dict[str, str] = {}
        self.announced = ""

    def feed(self, text: str) -> None:
        for part in text.splitlines(keepends=True):
            self.line += part
            if part.endswith("\n"):
                self.finish(self.line.rstrip())
                self.line = ""
            elif (m := _START.match(self.line)) and m[3] != self.announced:
                self.announced = m[3]
                _tell(progress=[m[3], int(m[1]), int(m[2])])

    def finish(self, line: str) -> None:
        if m := _FALLBACK.match(line):
            self.wanted[m[1]] = m[2].upper()
        elif m := _START.match(line):
            becomes = _BECOMES.search(line, m.end())
            type = (becomes[1] or becomes[2]) if becomes else m[4]
            _tell(choice=[m[3], type.upper(), self.wanted.get(m[3])])
        elif line.strip(" ="):
            self.tail = [*self.tail[-5:], line.strip()]

    def complaint(self) -> str:
        """Why llama.cpp gave up: its last words, without those it always says."""
        text = " ".join(self.tail)
        return text.rpartition("failed to quantize: ")[2]


# Native code prints to stdout now and then: the answers get a descriptor of their own.
_answers = os.fdopen(os.dup(1), "w") if __name__ == "__main__" else sys.stdout


def _tell(**event: Any) -> None:
    print(json.dumps(event), file=_answers, flush=True)


def _run(request: Request) -> str | None:
    """Quantize; returns llama.cpp's complaint, or None."""
    import llama_cpp.llama_cpp as lib

    log = _Log()

    @lib.llama_log_callback
    def on_log(level: int, text: bytes, user_data: object) -> None:
        log.feed(text.decode("utf-8", "replace"))

    lib.llama_log_set(on_log, ctypes.c_void_p(0))
    params = lib.llama_model_quantize_default_params()
    params.nthread = request.threads
    params.ftype = request.ftype
    params.pure = request.pure
    params.quantize_output_tensor = not request.leave_output
    params.allow_requantize = request.requantize
    params.dry_run = request.dry_run
    if request.output_type:
        params.output_tensor_type = TYPE_BY_NAME[request.output_type].id
    if request.embedding_type:
        params.token_embedding_type = TYPE_BY_NAME[request.embedding_type].id
    keep = []  # what the C structures point to
    if request.tensor_types:
        overrides = (lib.llama_model_tensor_override * (len(request.tensor_types) + 1))()
        for slot, (pattern, wish) in zip(overrides, request.tensor_types, strict=False):
            slot.pattern, slot.type = pattern.encode(), TYPE_BY_NAME[wish].id
        overrides[-1].pattern, overrides[-1].type = None, lib.GGML_TYPE_COUNT
        params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
        keep.append(overrides)
    if request.imatrix:
        importance = read_imatrix(Path(request.imatrix))
        means = importance.means()
        data = (lib.llama_model_imatrix_data * (len(means) + 1))()
        for slot, (name, values) in zip(data, means.items(), strict=False):
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(type(slot.data))
        params.imatrix = ctypes.cast(data, type(params.imatrix))
        kv = imatrix_fields(Path(request.imatrix).name, importance.datasets, len(means), importance.n_chunks)
        overrides_kv = (lib.llama_model_kv_override * (len(kv) + 1))()
        for slot, (key, value) in zip(overrides_kv, kv.items(), strict=False):
            slot.key = key.encode()
            slot.tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT if isinstance(value, int) else lib.LLAMA_KV_OVERRIDE_TYPE_STR
            if isinstance(value, int):
                slot.value.val_i64 = value
            else:
                slot.value.val_str = value.encode()
        params.kv_overrides = ctypes.cast(overrides_kv, type(params.kv_overrides))
        keep += [means, data, overrides_kv]
    status = lib.llama_model_quantize(os.fsencode(request.src), os.fsencode(request.dst), ctypes.byref(params))
    return log.complaint() or f"status {status}" if status else None


def imatrix_fields(file: str, datasets: tuple[str, ...], n_entries: int, n_chunks: int) -> dict[str, str | int]:
    """The keys that tell of the imatrix in the quantized file; as llama-quantize writes them, but for the file's folder."""
    fields: dict[str, str | int] = {"quantize.imatrix.file": _clipped(file)}
    if datasets:
        fields["quantize.imatrix.dataset"] = _clipped(datasets[0])
    fields["quantize.imatrix.entries_count"] = n_entries
    if n_chunks > 0:
        fields["quantize.imatrix.chunks_count"] = n_chunks
    return fields


def _clipped(text: str) -> str:
    return text.encode()[:_MAX_KV].decode("utf-8", "ignore")


def _die_with_parent() -> None:
    for _ in sys.stdin:
        pass
    os._exit(1)


def _requests() -> Iterator[Request]:
    content = json.loads(sys.stdin.readline())
    content["tensor_types"] = [tuple(pair) for pair in content["tensor_types"]]
    yield Request(**content)


if __name__ == "__main__":
    os.dup2(2, 1)
    for request in _requests():
        threading.Thread(target=_die_with_parent, daemon=True).start()
        _tell(failure=_run(request))
