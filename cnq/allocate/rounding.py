"""How the final run rounds rows, for measuring what it does: ggml's own rounding, or the compensated one."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..engine import rows
from ..engine.codes import can_change
from ..engine.quantizer import DAMPING, ORDERS
from ..gguf_file import TensorType
from ..hessian_file import Statistics

if TYPE_CHECKING:
    from ..engine.compensate import Hessian


class Rounding(Protocol):
    def encoded(self, tensor: str, matrix: int, values: np.ndarray, type: TensorType) -> np.ndarray:
        """Rows (n, columns) float32 of one matrix of a tensor, in the form of `type`: (n, bytes per row) uint8."""
        ...


def decoded(data: np.ndarray, type: TensorType, columns: int) -> np.ndarray:
    """(n, columns) float32 of stored rows."""
    data = np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1)
    return rows.decode(data, type, np.empty(len(data) * columns, np.float32))


@dataclass(frozen=True)
class Plain:
    """ggml's own rounding. importance: tensor -> flat E[x²] (Importance.means)."""

    importance: Mapping[str, np.ndarray]

    def weights(self, tensor: str, matrix: int, columns: int) -> np.ndarray | None:
        found = self.importance.get(tensor)
        return None if found is None else found[matrix * columns :][:columns]

    def encoded(self, tensor: str, matrix: int, values: np.ndarray, type: TensorType) -> np.ndarray:
        n, columns = values.shape
        out = np.empty(n * type.row_bytes(columns), np.uint8)
        return rows.encode(values, type, self.weights(tensor, matrix, columns), out).reshape(n, -1)


@dataclass(frozen=True)
class Compensating:
    """Compensated rounding (engine/compensate.py) where the final run does it; else ggml's. Of what the final run tries for a
    matrix, and takes the best of, the first alone.

    The last factor is kept, and computed in `threads`: go through the types of one matrix after those of another.
    """

    plain: Plain
    statistics: Statistics
    threads: int
    _last: "dict[int, Hessian]" = field(default_factory=dict)
    _reading: threading.Lock = field(default_factory=threading.Lock)

    def encoded(self, tensor: str, matrix: int, values: np.ndarray, type: TensorType) -> np.ndarray:
        number = self.statistics.find(tensor, None)
        number = self.statistics.find(tensor, matrix) if number is None else number
        if number is None or not can_change(type) or not self.statistics.inputs[number].enough:
            return self.plain.encoded(tensor, matrix, values, type)
        from ..engine.compensate import compensate  # a compiler comes with it

        weights = self.plain.weights(tensor, matrix, values.shape[1])
        return compensate(values, type, weights, self._hessian(number), orders=ORDERS[:1]).rows

    def _hessian(self, number: int) -> "Hessian":
        from ..engine.compensate import Hessian

        with self._reading:
            if number not in self._last:
                self._last.clear()
                sums = self.statistics.read(number)
                hessian = Hessian(sums.fit, sums.held, sums.n_fit, sums.n_held)
                with ThreadPoolExecutor(self.threads) as pool:
                    hessian.factor(DAMPING, ORDERS[0], pool)
                self._last[number] = hessian
            return self._last[number]
