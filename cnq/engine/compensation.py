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

Result = tuple[Outcome, int, np.ndarray]  # what came of a matrix, the byte of its tensor where it starts, its rounded rows


class Compensation:
    """The compensated part of a quantization. names: of the tensors it writes; in one that is a stack of matrices, of all."""

    def __init__(
        self, file: GgufFile, types: dict[str, TensorType], importance: dict[str, np.ndarray], statistics: Statistics
    ) -> None:
        """importance: name -> flat float32 E[x²] of its matrices."""
        self.file, self.types, self._importance, self.statistics = file, types, importance, statistics
        known = {name for one in statistics.inputs for name in one.weights} & types.keys()
        rounded = {name for name in known if types[name] not in (F32, F16, BF16, file.tensors[name].type)}
        self._fixed = sorted(name for name in rounded if not can_change(types[name]))
        self.names = rounded - set(self._fixed)
        self._begun: set[str] = set()

    def run(self, threads: int, begin: Callable[[str], object]) -> Iterator[Result]:
        """Round all of them. begin: hears a tensor's name.

        Memory at a time: a matrix as float32 and its candidates, H of its input with a sketch of the rows held back, and its
        factors. Raises QuantizeError, StatisticsError.
        """
        yield from self.not_tried()
        for number in range(len(self.statistics.inputs)):
            yield from self.rounded(number, threads, begin)

    def not_tried(self) -> Iterator[Result]:
        """The matrices that keep ggml's codes because of their type."""
        for name in self._fixed:
            yield self._not_tried(name, None, "codes of this type stand for groups"), 0, np.empty(0, np.uint8)

    def rounded(self, number: int, threads: int, begin: Callable[[str], object]) -> Iterator[Result]:
        """Round the matrices of one input, by what the float model multiplies them with."""
        one, hessian = self.statistics.inputs[number], None
        for name in one.weights:
            if name not in self.names:
                continue
            self.began(name, begin)
            weights, importance, start = self.matrix(name, one.expert or 0)
            type = self.types[name]
            if not one.enough:
                reason = f"{one.n_fit} tokens, and {one.n_held} to judge by, are too few"
                yield self._not_tried(name, one.expert, reason), start, plain(name, weights, type, importance)
                continue
            if hessian is None:
                sums = self.statistics.read(number)
                hessian = Hessian(sums.fit, sums.held, sums.n_fit, sums.n_held)
            found = compensated(name, weights, type, importance, hessian, threads)
            outcome = Outcome(
                name, one.expert, type.name, None, found.loss_plain, found.loss, found.kept, found.damping, found.by_diagonal
            )
            yield outcome, start, found.rows

    def began(self, name: str, begin: Callable[[str], object]) -> None:
        """Tell of a tensor, once."""
        if name not in self._begun:
            self._begun.add(name)
            begin(name)

    def _not_tried(self, name: str, expert: int | None, reason: str) -> Outcome:
        return Outcome(name, expert, self.types[name].name, reason)

    def matrix(self, name: str, expert: int) -> tuple[np.ndarray, np.ndarray | None, int]:
        """A matrix (n, d) float32, its importance (d,), and the byte of the rounded tensor where it starts."""
        tensor, type = self.file.tensor(name), self.types[name]
        n, d = tensor.shape[-2:]
        stored = tensor.rows()[expert * n : (expert + 1) * n]
        if not rows.is_sound(stored, tensor.type):
            raise QuantizeError(f"{name} holds NaN or infinity already. Make the file again.")
        weights = rows.decode(stored, tensor.type, np.empty(n * d, np.float32))
        own = self._importance[name][expert * d : (expert + 1) * d] if name in self._importance else None
        return weights, own, expert * n * type.row_bytes(d)


def compensated(
    name: str, weights: np.ndarray, type: TensorType, importance: np.ndarray | None, hessian: Hessian, threads: int
) -> Compensated:
    try:
        return compensate(weights, type, importance, hessian, threads=threads)
    except QuantizeError as error:
        raise QuantizeError(f"{name}: {error}") from error


def plain(name: str, weights: np.ndarray, type: TensorType, importance: np.ndarray | None) -> np.ndarray:
    data = rows.encode(weights, type, importance, np.empty(len(weights) * type.row_bytes(weights.shape[1]), np.uint8))
    if not rows.is_sound(data, type):
        raise QuantizeError(f"{name} is too large for {type.name}. Choose another type for it.")
    return data
