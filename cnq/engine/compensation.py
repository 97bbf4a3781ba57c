"""Which tensors of a file are rounded with compensation, and in what order: those with the same input one after the other."""

from collections.abc import Callable, Iterator

import numpy as np

from ..errors import QuantizeError
from ..gguf_file import BF16, F16, F32, GgufFile, TensorType
from ..hessian_file import Statistics
from . import rows
from .codes import can_change
from .compensate import Compensated, Hessian, compensate
from .quantizer import Outcome


class Compensation:
    """The compensated part of a quantization. names: of the tensors it writes; in one that is a stack of matrices, of all."""

    def __init__(
        self, file: GgufFile, types: dict[str, TensorType], importance: dict[str, np.ndarray], statistics: Statistics
    ) -> None:
        """importance: name -> flat float32 E[x²] of its matrices."""
        self._file, self._types, self._importance, self._statistics = file, types, importance, statistics
        known = {name for one in statistics.inputs for name in one.weights} & types.keys()
        rounded = {name for name in known if types[name] not in (F32, F16, BF16, file.tensors[name].type)}
        self._fixed = sorted(name for name in rounded if not can_change(types[name]))
        self.names = rounded - set(self._fixed)

    def run(self, threads: int, begin: Callable[[str], object]) -> Iterator[tuple[Outcome, int, np.ndarray]]:
        """Yield what came of each matrix, the byte of its tensor where it starts, and its rounded rows.

        begin: hears a tensor's name. Memory at a time: a matrix as float32 and its candidates, H of its input with a sketch of
        the rows held back, and its factors. Raises QuantizeError, StatisticsError.
        """
        for name in self._fixed:
            yield self._not_tried(name, None, "codes of this type stand for groups"), 0, np.empty(0, np.uint8)
        begun: set[str] = set()
        for number, one in enumerate(self._statistics.inputs):
            hessian = None
            for name in one.weights:
                if name not in self.names:
                    continue
                if name not in begun:
                    begun.add(name)
                    begin(name)
                weights, importance, start = self._matrix(name, one.expert or 0)
                type = self._types[name]
                if not one.enough:
                    reason = f"{one.n_fit} tokens, and {one.n_held} to judge by, are too few"
                    yield self._not_tried(name, one.expert, reason), start, _plain(name, weights, type, importance)
                    continue
                if hessian is None:
                    sums = self._statistics.read(number)
                    hessian = Hessian(sums.fit, sums.held, sums.n_fit, sums.n_held)
                found = _compensated(name, weights, type, importance, hessian, threads)
                outcome = Outcome(
                    name, one.expert, type.name, None, found.loss_plain, found.loss, found.kept, found.damping,
                    found.by_diagonal,
                )  # fmt: skip
                yield outcome, start, found.rows

    def _not_tried(self, name: str, expert: int | None, reason: str) -> Outcome:
        return Outcome(name, expert, self._types[name].name, reason)

    def _matrix(self, name: str, expert: int) -> tuple[np.ndarray, np.ndarray | None, int]:
        """A matrix (n, d) float32, its importance (d,), and the byte of the rounded tensor where it starts."""
        tensor, type = self._file.tensor(name), self._types[name]
        n, d = tensor.shape[-2:]
        stored = tensor.rows()[expert * n : (expert + 1) * n]
        if not rows.is_sound(stored, tensor.type):
            raise QuantizeError(f"{name} holds NaN or infinity already. Make the file again.")
        weights = rows.decode(stored, tensor.type, np.empty(n * d, np.float32))
        own = self._importance[name][expert * d : (expert + 1) * d] if name in self._importance else None
        return weights, own, expert * n * type.row_bytes(d)


def _compensated(
    name: str, weights: np.ndarray, type: TensorType, importance: np.ndarray | None, hessian: Hessian, threads: int
) -> Compensated:
    try:
        return compensate(weights, type, importance, hessian, threads=threads)
    except QuantizeError as error:
        raise QuantizeError(f"{name}: {error}") from error


def _plain(name: str, weights: np.ndarray, type: TensorType, importance: np.ndarray | None) -> np.ndarray:
    data = rows.encode(weights, type, importance, np.empty(len(weights) * type.row_bytes(weights.shape[1]), np.uint8))
    if not rows.is_sound(data, type):
        raise QuantizeError(f"{name} is too large for {type.name}. Choose another type for it.")
    return data
