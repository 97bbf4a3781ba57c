"""Rounding that makes up for its own errors, inside the blocks that every llama.cpp reads.

Scales and minima are ggml's, with the importance matrix; only the codes are chosen again, column by column, each column taking
over what the errors of those before it did to the layer's output on the calibration text (factor.py). Types and bytes stay.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..errors import QuantizeError
from ..gguf_file import TensorType
from . import rows
from .codes import Form, form
from .factor import Factor, factorized

_TILE = 1024  # rows rounded at once: columns of 4 kB, as the inner loop goes by columns
_SUB = 32  # columns after which errors are handed on to the rest of a block
_BLOCK = 256  # and after which they are handed on to the next block


@dataclass(frozen=True)
class Hessian:
    """Σ x xᵀ over the inputs of a matrix, (d, d) float32: `fit` for rounding, `held` over other rows, for judging it.

    n_fit, n_held: rows. Tensors with the same input share one, and with it its factors.
    """

    fit: np.ndarray
    held: np.ndarray
    n_fit: int
    n_held: int
    _factors: dict[tuple[float, bool], Factor] = field(default_factory=dict, repr=False)

    def factor(self, damping: float, by_diagonal: bool, pool: Executor) -> Factor:
        """Computed once. by_diagonal: blocks, and the columns in each, go by how large their inputs are."""
        key = (damping, by_diagonal)
        if key not in self._factors:
            order = _by_diagonal(self.fit) if by_diagonal else np.arange(len(self.fit))
            self._factors[key] = factorized(self.fit, damping, order, pool)
        return self._factors[key]


def _by_diagonal(hessian: np.ndarray) -> np.ndarray:
    """Columns so that super-blocks stay together: the heaviest first, and in each the heaviest column."""
    blocks = np.diag(hessian).reshape(-1, _width(len(hessian)))
    inside = np.argsort(-blocks, 1, kind="stable")
    return np.concatenate([inside[b] + b * blocks.shape[1] for b in np.argsort(-blocks.sum(1), kind="stable")])


def _width(columns: int) -> int:
    """Columns of a block: 256, or less in a row that is no multiple of it, which only types with blocks of 32 can store."""
    return int(np.gcd(columns, _BLOCK))


@dataclass(frozen=True)
class Compensated:
    """rows: (n, bytes per row) uint8. loss, loss_plain: mean square of the output's error over the held-back inputs.

    kept: whether the compensated codes were better than plain ones, and are in `rows`; damping and by_diagonal: how they were
    made.
    """

    rows: np.ndarray
    loss_plain: float
    loss: float
    damping: float
    by_diagonal: bool
    kept: bool


def compensate(
    weights: np.ndarray,
    type: TensorType,
    importance: np.ndarray | None,
    hessian: Hessian,
    *,
    dampings: Sequence[float] = (0.05,),
    orders: Sequence[bool] = (False,),
    threads: int = 1,
) -> Compensated:
    """Round a matrix (n, d) float32 to `type`.

    importance: (d,) float32, as ggml weighs errors in its search for scales; None: alike. The rounding does not depend on
    `threads`; it is fastest where BLAS has one thread of its own.
    Raises QuantizeError: weights that are not finite or too large for the type, a type whose codes stand for groups
    (codes.can_change), statistics of other columns or that are not positive definite.
    """
    shape = form(type)
    n, d = weights.shape
    if hessian.fit.shape != (d, d) or hessian.held.shape != (d, d):
        raise QuantizeError(
            f"the statistics are of {hessian.fit.shape[0]} columns, the weights have {d}. They are of another model."
        )
    if not np.isfinite(weights).all():
        raise QuantizeError("the weights hold NaN or infinity.")
    with ThreadPoolExecutor(threads) as pool:
        plain, loss_plain = _all(pool, weights, lambda part: _plain(part, type, importance), type, hessian)
        tried = []
        for by_diagonal in orders:
            for damping in dampings:
                factor = hessian.factor(damping, by_diagonal, pool)
                again, loss = _all(pool, weights, lambda part: feedback(part, shape, importance, factor), type, hessian)
                tried.append((loss, damping, by_diagonal, again))
        loss, damping, by_diagonal, again = min(tried, key=lambda t: t[0])
    kept = loss < loss_plain
    return Compensated(again if kept else plain, loss_plain, loss if kept else loss_plain, damping, by_diagonal, kept)


def _tiles(n: int) -> Iterator[slice]:
    for start in range(0, n, _TILE):
        yield slice(start, min(start + _TILE, n))


def _all(
    pool: Executor, weights: np.ndarray, round: Callable[[np.ndarray], np.ndarray], type: TensorType, hessian: Hessian
) -> tuple[np.ndarray, float]:
    """Rows rounded tile by tile, and what they lose on the held-back inputs."""
    out = np.empty((len(weights), type.row_bytes(weights.shape[1])), np.uint8)

    def do(tile: slice) -> float:
        part = np.ascontiguousarray(weights[tile])
        out[tile] = round(part)
        error = part - decoded(out[tile], type, part.shape[1])
        return float(np.einsum("ij,ij->", error @ hessian.held, error, dtype=np.float64))

    loss = sum(pool.map(do, _tiles(len(weights)))) / hessian.n_held
    return out, loss


def decoded(data: np.ndarray, type: TensorType, columns: int) -> np.ndarray:
    return rows.decode(data, type, np.empty(len(data) * columns, np.float32))


def _plain(part: np.ndarray, type: TensorType, importance: np.ndarray | None) -> np.ndarray:
    out = np.empty(len(part) * type.row_bytes(part.shape[1]), np.uint8)
    return rows.encode(part, type, importance, out).reshape(len(part), -1)


def feedback(weights: np.ndarray, shape: Form, importance: np.ndarray | None, factor: Factor) -> np.ndarray:
    """(n, bytes per row) uint8 of (n, d) float32 rows, contiguous: rounded with error feedback.

    A tile is worked on with its columns as rows, so that each step of the inner loop goes over memory in a line.
    """
    n, d = weights.shape
    width = _width(d)
    size = shape.type.row_bytes(width)
    out = np.empty((n, d // width, size), np.uint8)
    original = np.ascontiguousarray(weights.T)[factor.order]  # (d, n)
    errors = np.empty_like(original)
    for start in range(0, d, width):
        own = slice(start, start + width)
        block, inside = divmod(factor.order[own], width)
        now = original[own] + factor.feedback[:start, own].T @ errors[:start]
        columns = slice(block[0] * width, (block[0] + 1) * width)
        values = np.empty((n, width), np.float32)
        values[:, inside] = now.T
        data = _plain(values, shape.type, None if importance is None else importance[columns])
        scales = shape.scales(data)
        steps, offsets = scales.steps().T.copy(), scales.offsets()
        offsets = None if offsets is None else offsets.T.copy()
        codes = np.empty((width, n), np.uint8)
        within = factor.feedback[own, own]
        for sub in range(0, width, _SUB):
            end = min(sub + _SUB, width)
            for c in range(sub, end):
                if c > sub:
                    now[c] += within[sub:c, c] @ errors[start + sub : start + c]
                group = inside[c] // shape.group
                step, offset = steps[group], None if offsets is None else offsets[group]
                codes[inside[c]], value = _nearest(now[c], step, offset, shape)
                np.subtract(original[start + c], value, out=errors[start + c])
            if end < width:
                now[end:] += within[sub:end, end:].T @ errors[start + sub : start + end]
        shape.put_codes(data, np.ascontiguousarray(codes.T))
        out[:, block[0]] = data
    return out.reshape(n, -1)


def _nearest(values: np.ndarray, step: np.ndarray, offset: np.ndarray | None, shape: Form) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the nearest values that a group can hold, and those values. A step of 0 takes the first code."""
    first, last = shape.usable
    levels = shape.levels
    moved = values if offset is None else values - offset
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = moved / step
    np.nan_to_num(scaled, copy=False, nan=levels[first], posinf=levels[last], neginf=levels[first])
    if shape.uniform:
        level = np.clip(np.rint(scaled), levels[first], levels[last])
        code = (level - levels[0]).astype(np.uint8)
    else:
        code = np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled).astype(np.uint8)
        level = levels[code]
    level = level * step
    return code, level if offset is None else level + offset
