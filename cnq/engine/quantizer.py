"""llama.cpp's quantizer, in a process of its own.

What each tensor becomes is asked of llama_model_quantize itself, in a dry run. The rounding is ggml's, in threads that need not
wait for each other (worker.py), with the bytes of llama-quantize.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import QuantizeError
from ..gguf_file import TYPE_BY_NAME, TensorType
from .child import Child


@dataclass(frozen=True)
class Choice:
    """What llama.cpp decides for a tensor. wanted: the type it fell back from, because rows do not fill its blocks."""

    name: str
    type: TensorType
    wanted: TensorType | None


class Quantizer(Child):
    """A child process that quantizes one GGUF."""

    def __init__(self, src: Path):
        self.src = src
        super().__init__(f"{__package__}.worker", lambda reason: QuantizeError(f"{src} was not quantized: {reason}"))

    def ftypes(self) -> dict[str, int]:
        """Every quantization the linked llama.cpp offers: name -> llama_ftype, the smallest first."""
        return dict(self.ask("ftypes", {}))

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
        told: list[Any] = []
        self.ask("decide", {"src": str(self.src)} | arguments, told.append)
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
        self.ask("round", {"src": str(self.src)} | arguments, lambda event: progress(*event))
        self.kill()  # it gives its memory back while the caller goes on
