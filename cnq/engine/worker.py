"""The child of quantizer.py: asks llama.cpp what each tensor becomes, and rounds them."""

import ctypes
import os
import re
import sys
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec, module_from_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __name__ == "__main__" and (package := find_spec("llama_cpp")):
    # The bindings alone: the package around them, which would load servers and chat formats, is left empty in this process.
    sys.modules["llama_cpp"] = module_from_spec(package)

import llama_cpp.llama_cpp as lib

from ..errors import QuantizeError
from ..gguf_file import TYPE_BY_NAME, TYPES, GgufFile, Tensor, TensorType, retyped
from ..hessian_file import read_statistics
from ..imatrix_file import read_imatrix
from ..machine import logical_cores
from . import rows
from .child import Tell, serve

if TYPE_CHECKING:
    from .compensation import Result

_CHUNK = 1 << 18  # elements of a task: 1 MB of float32, which stays in a core's cache

# What llama.cpp decides. It tells of it in its log only.

_START = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = *(\S+?),")
_BECOMES = re.compile(r"\((\S+)\)\s*$")
_FALLBACK = re.compile(r"warning: (\S+) +- ncols .* \(required for type +(\S+?)\).* -> falling back to +(\S+)")


def ftypes() -> dict[str, int]:
    """Every quantization the linked llama.cpp offers: name -> llama_ftype, the smallest first."""
    # llama-ext.h; not in the Python bindings. Numbers that llama.cpp only reads (NVFP4) have no type here.
    default_type = lib._lib["_Z28llama_ftype_get_default_type11llama_ftype"]
    named = re.compile("LLAMA_FTYPE_(?:ALL|MOSTLY)_(.+)")
    found = {m[1]: int(getattr(lib, m[0])) for m in map(named.fullmatch, dir(lib)) if m}
    offered = {name: TYPES[default_type(number)] for name, number in found.items() if default_type(number) in TYPES}
    return {name: found[name] for name in sorted(offered, key=lambda name: (offered[name].bits, found[name]))}


class _Log:
    """Puts llama.cpp's lines together, and passes on what the parent wants to know."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.line = ""
        self.tail: list[str] = []
        self.wanted: dict[str, str] = {}

    def feed(self, text: str) -> None:
        for part in text.splitlines(keepends=True):
            self.line += part
            if part.endswith("\n"):
                self.finish(self.line.rstrip())
                self.line = ""

    def finish(self, line: str) -> None:
        if m := _FALLBACK.match(line):
            self.wanted[m[1]] = m[2].upper()
        elif m := _START.match(line):
            becomes = _BECOMES.search(line, m.end())
            self.tell([m[1], (becomes[1] if becomes else m[2]).upper(), self.wanted.get(m[1])])
        elif line.strip(" ="):
            self.tail = [*self.tail[-5:], line.strip()]

    def complaint(self) -> str:
        """Why llama.cpp gave up: its last words, without those it always says."""
        return " ".join(self.tail).rpartition("failed to quantize: ")[2]


def _decide(
    tell: Tell,
    src: str,
    ftype: int,
    with_imatrix: bool,
    tensor_types: list[tuple[str, str]],
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
    requantize: bool,
) -> None:
    """A dry run of llama_model_quantize; tells of each tensor: name, type, type it fell back from. Raises QuantizeError."""
    log = _Log(tell)

    @lib.llama_log_callback
    def on_log(level: int, text: bytes, user_data: object) -> None:
        log.feed(text.decode("utf-8", "replace"))

    lib.llama_log_set(on_log, ctypes.c_void_p(0))
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.pure, params.allow_requantize, params.dry_run = ftype, pure, requantize, True
    if output_type:
        params.output_tensor_type = TYPE_BY_NAME[output_type].id
    if embedding_type:
        params.token_embedding_type = TYPE_BY_NAME[embedding_type].id
    if tensor_types:
        overrides = (lib.llama_model_tensor_override * (len(tensor_types) + 1))()
        for slot, (pattern, wish) in zip(overrides, tensor_types, strict=False):
            slot.pattern, slot.type = pattern.encode(), TYPE_BY_NAME[wish].id
        overrides[-1].pattern, overrides[-1].type = None, lib.GGML_TYPE_COUNT
        params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    if with_imatrix:  # which one makes no difference to the types, that there is one does
        data = (lib.llama_model_imatrix_data * 2)()
        value = np.ones(1, np.float32)
        data[0].name, data[0].size = b"any", 1
        data[0].data = value.ctypes.data_as(type(data[0].data))
        params.imatrix = ctypes.cast(data, type(params.imatrix))
    status = lib.llama_model_quantize(os.fsencode(src), b"", ctypes.byref(params))
    if status:
        raise QuantizeError(log.complaint() or f"llama.cpp ended with status {status}.")


# Rounding


@dataclass(frozen=True)
class _Task:
    """Some rows of a tensor: of one of its matrices, as each expert has weights of its own. start: in the output file."""

    number: int
    tensor: Tensor
    type: TensorType
    rows: slice
    weights: np.ndarray | None
    start: int


def _tasks(
    file: GgufFile, types: dict[str, TensorType], starts: dict[str, int], weights: dict[str, np.ndarray]
) -> Generator[_Task, None, None]:
    for number, (name, type) in enumerate(types.items(), 1):
        tensor = file.tensor(name)
        columns = tensor.shape[-1]
        matrix_rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
        step = max(1, _CHUNK // columns)
        for matrix in range(prod(tensor.shape[:-2])):
            first = matrix * matrix_rows
            own = weights[name][matrix * columns :][:columns] if name in weights else None
            for row in range(first, first + matrix_rows, step):
                part = slice(row, min(row + step, first + matrix_rows))
                yield _Task(number, tensor, type, part, own, starts[name] + row * type.row_bytes(columns))


def _round(
    tell: Tell,
    src: str,
    dst: str,
    types: list[tuple[str, str]],
    fields: dict[str, str | int],
    imatrix: str | None,
    statistics: str | None,
    sequential: str | None,
    threads: int,
) -> list[dict[str, Any]]:
    """Write the copy of `src` with other types; tells of each tensor as it begins: name, number, of how many.

    The result is llama_model_quantize's, byte for byte; but its threads meet after each tensor, while it is written.
    statistics: folder of second moments; tensors that have some are rounded with compensation, after the others, and what
    came of it is returned (quantizer.Outcome). sequential: do that layer by layer, with this folder for files in between.
    """
    file = GgufFile(Path(src))
    wanted = {name: TYPE_BY_NAME[type] for name, type in types}
    layout = retyped(file, fields, wanted)
    weights = read_imatrix(Path(imatrix)).means() if imatrix else {}
    threads = threads or logical_cores()
    later = None
    if statistics:
        from .compensation import Compensation  # a compiler comes with it

        later = Compensation(file, wanted, weights, read_statistics(Path(statistics)))
    now = {name: type for name, type in wanted.items() if later is None or name not in later.names}
    tasks = _tasks(file, now, layout.starts, weights)
    taking, writing = threading.Lock(), threading.Lock()
    begun = 0

    def begin(name: str) -> None:
        nonlocal begun
        begun += 1
        tell([name, begun, len(wanted)])

    def written(name: str) -> np.ndarray:
        """The bytes of a tensor that is in the file already."""
        out.flush()
        size = prod(file.tensors[name].shape[:-1]) * wanted[name].row_bytes(file.tensors[name].shape[-1])
        return np.fromfile(dst, np.uint8, size, offset=layout.starts[name])

    def work() -> None:
        try:
            round_all()
        except BaseException:
            with taking:
                tasks.close()  # nothing more for the others either
            raise

    def round_all() -> None:
        floats, codes = np.empty(0, np.float32), np.empty(0, np.uint8)
        while True:
            with taking:
                if (task := next(tasks, None)) is None:
                    return
                if task.number > begun:
                    begin(task.tensor.name)
            data = task.tensor.rows()[task.rows]
            _require_sound(task, data, task.tensor.type, "holds NaN or infinity already. Make the file again.")
            if task.tensor.type != task.type:
                n = len(data) * task.tensor.shape[-1]
                if n > floats.size:
                    floats, codes = np.empty(n, np.float32), np.empty(4 * n, np.uint8)
                data = rows.encode(rows.decode(data, task.tensor.type, floats), task.type, task.weights, codes)
                _require_sound(task, data, task.type, f"is too large for {task.type.name}. Choose another type for it.")
            with writing:
                out.seek(task.start)
                out.write(data.data)

    with open(dst, "wb") as out, ThreadPoolExecutor(threads) as pool:  # noqa: PTH123
        out.write(layout.head)
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
        outcomes = []
        results: Iterable[Result] = later.run(threads, begin) if later else ()
        if later and sequential:
            from .sequential import LayerByLayer  # llama.cpp's log is told to another from here on

            results = LayerByLayer(later, written, Path(sequential)).run(threads, begin)
        for outcome, start, data in results:
            outcomes.append(asdict(outcome))
            out.seek(layout.starts[outcome.name] + start)
            out.write(data.data)
        out.truncate(layout.nbytes)
    return outcomes


def _require_sound(task: _Task, data: np.ndarray, type: TensorType, otherwise: str) -> None:
    if not rows.is_sound(data, type):
        raise QuantizeError(f"{task.tensor.name}, rows {task.rows.start} to {task.rows.stop - 1}, {otherwise}")


if __name__ == "__main__":
    serve({"ftypes": lambda tell: list(ftypes().items()), "decide": _decide, "round": _round})
