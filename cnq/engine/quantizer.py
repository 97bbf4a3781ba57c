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

# Of compensated rounding: the share of the diagonal that is added to it. Not chosen for each matrix by inputs held back: these
# are of the same texts, where less damping looks better, and texts unlike them lost more by it (docs/rounding.md).
DAMPING = 1.0
# Whether columns go by the diagonal. Tried for each matrix; the better one on inputs held back is taken.
ORDERS: tuple[bool, ...] = (True, False)


@dataclass(frozen=True)
class Outcome:
    """What came of the compensation of a matrix. expert: its number in a stack of matrices.

    loss, loss_plain: mean square of the error at the layer's output over inputs held back, with compensation and without.
    Where rounding goes layer by layer it holds what comes with the input, and where a product is added to hidden states it is
    a share of their mean square.
    kept: whether the compensated codes were better, and stand in the file. damping, by_diagonal: how they were made.
    reason: why it was not tried; the other figures are None then.
    """

    name: str
    expert: int | None
    type: str
    reason: str | None = None
    loss_plain: float | None = None
    loss: float | None = None
    kept: bool = False
    damping: float | None = None
    by_diagonal: bool | None = None


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
        statistics: Path | None = None,
        sequential: Path | None = None,
        threads: int = 0,
        progress: Callable[[str, int, int], object] = lambda name, number, total: None,
    ) -> list[Outcome]:
        """Write the copy of the file in which tensors have these types (all of them, in the copy's order) to `dst`.

        fields: metadata that comes behind the file's own. imatrix: weighs the rounding errors of the tensors it knows.
        statistics: folder of second moments (cnq.hessian_file) to round with compensation by; what came of it is returned.
        sequential: do it layer by layer, with this folder for files in between, which the caller removes.
        progress: hears each tensor's name as it begins, its number, and how many there are.
        Raises QuantizeError: numbers that are not finite, or the signal that killed the child; OSError: dst cannot be written.
        """
        arguments = {
            "dst": str(dst), "types": [(name, type.name) for name, type in types.items()], "fields": fields,
            "imatrix": str(imatrix) if imatrix else None, "statistics": str(statistics) if statistics else None,
            "sequential": str(sequential) if sequential else None, "threads": threads,
        }  # fmt: skip
        outcomes = self.ask("round", {"src": str(self.src)} | arguments, lambda event: progress(*event))
        self.kill()  # it gives its memory back while the caller goes on
        return [Outcome(**outcome) for outcome in outcomes]
