"""llama.cpp's quantizer in a process of its own: an abort of native code becomes one error, Ctrl-C leaves nothing running.

What each tensor becomes is asked of llama_model_quantize itself, in a dry run. The rounding is ggml's, in threads that need not
wait for each other (worker.py), with the bytes of llama-quantize.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import QuantizeError
from ..gguf_file import TYPE_BY_NAME, TYPES, TensorType


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


class Quantizer:
    """A child process that quantizes one GGUF. Use it in a `with`; it starts at once, and its parent may go on meanwhile."""

    def __init__(self, src: Path):
        self.src = src

    def __enter__(self) -> "Quantizer":
        self._child = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # an abort prints its reason, and does not call a debugger
        )
        self._errors: list[str] = []
        self._reader = threading.Thread(target=lambda: self._errors.extend(self._child.stderr or ()), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._child.kill()
        self._child.wait()
        self._reader.join()
        for stream in (self._child.stdin, self._child.stdout, self._child.stderr):
            with suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def decide(
        self,
        ftype: int,
        *,
        with_imatrix: bool = False,
        tensor_types: Sequence[tuple[str, str]] = (),
        output_type: str | None = None,
        embedding_type: str | None = None,
        pure: bool = False,
        requantize: bool = False,
    ) -> list[Choice]:
        """What llama_model_quantize would make of each tensor, in the order in which it writes them.

        The arguments are llama_model_quantize_params; tensor_types: (C++ regular expression, type), the first match counts.
        Raises QuantizeError with llama.cpp's words, or the signal that killed it.
        """
        arguments = {
            "ftype": ftype, "with_imatrix": with_imatrix, "tensor_types": list(tensor_types), "output_type": output_type,
            "embedding_type": embedding_type, "pure": pure, "requantize": requantize,
        }  # fmt: skip
        told = [event["choice"] for event in self._events("decide", arguments)]
        return [Choice(name, TYPE_BY_NAME[type], TYPE_BY_NAME.get(wanted or "")) for name, type, wanted in told]

    def round(
        self,
        dst: Path,
        types: dict[str, TensorType],
        fields: dict[str, str | int],
        *,
        imatrix: Path | None = None,
        threads: int = 0,
        progress: Callable[[str, int, int], object] = lambda name, number, total: None,
    ) -> None:
        """Write the copy of the file in which tensors have these types (all of them, in the copy's order) to `dst`.

        fields: metadata that comes behind the file's own. imatrix: weighs the rounding errors of the tensors it knows.
        progress: hears each tensor's name as it begins, its number, and how many there are.
        Raises QuantizeError: numbers that are not finite, or the signal that killed the child; OSError: dst cannot be written.
        """
        arguments = {
            "dst": str(dst), "types": [(name, type.name) for name, type in types.items()], "fields": fields,
            "imatrix": str(imatrix) if imatrix else None, "threads": threads,
        }  # fmt: skip
        for event in self._events("round", arguments):
            progress(*event["progress"])

    def _events(self, step: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What the child tells of a step until it is done."""
        assert self._child.stdin and self._child.stdout
        with suppress(BrokenPipeError):  # it is dead already: its exit code will tell
            self._child.stdin.write(json.dumps({"step": step, "src": str(self.src)} | arguments) + "\n")
            self._child.stdin.flush()
        for line in self._child.stdout:
            event = json.loads(line)
            if "errno" in event:
                raise OSError(event["errno"], os.strerror(event["errno"]))
            if "done" not in event:
                yield event
            elif event["done"]:
                raise QuantizeError(f"{self.src} was not quantized: {event['done']}")
            else:
                return
        self._child.wait()
        self._reader.join()
        if self._child.returncode < 0:
            name, last = signal.Signals(-self._child.returncode).name, "".join(self._errors[-1:]).strip()
            raise QuantizeError(f"{self.src} was not quantized: llama.cpp was ended by {name}. {last}")
        raise QuantizeError(f"{self.src} was not quantized: {' '.join(' '.join(self._errors[-3:]).split())}")
