"""Rounding that makes up for its own errors, inside the blocks that every llama.cpp reads.

First scales and minima are ggml's, and the codes are chosen column by column, each column taking over what the errors of those
before it did to the layer's output on the calibration text (factor.py); then everything is chosen again, one after the other
(refine.py). Types and bytes stay.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..errors import QuantizeError
from ..gguf_file import TensorType
from . import rows
from .codes import Form, form
from .factor import Factor, factorized, ridge
from .kernels import feed_back
from .quantizer import DAMPING, ORDERS
from .refine import Rounded, block_width, sweep

_TILE = 256  # rows that a thread works on at once
_SAMPLE, _SAMPLE_TILE = 128, 32  # rows that the order is chosen on
_SWEEPS = 4
_KEPT = 1 << 30  # bytes of factors that statistics hold, at most, beside the one in use


@dataclass(frozen=True)
class Hessian:
    """Second moments of the inputs of a matrix, float32.

    fit: (d, d), Σ x xᵀ, for rounding. held: (m, d), rows with heldᵀ held = Σ x xᵀ over other inputs, for judging it. n_fit,
    n_held: inputs. Tensors with the same input share one, and with it its factors.
    """

    fit: np.ndarray
    held: np.ndarray
    n_fit: int
    n_held: int
    _factors: dict[tuple[float, bool], Factor] = field(default_factory=dict, repr=False)

    def factor(self, damping: float, by_diagonal: bool, pool: Executor) -> Factor:
        """Computed once, as long as there is room.

        by_diagonal: blocks, and the columns in each, go by how large their inputs are.
        """
        key = (damping, by_diagonal)
        if key not in self._factors:
            while sum(factor.feedback.nbytes for factor in self._factors.values()) > _KEPT:
                del self._factors[next(iter(self._factors))]
            order = _by_diagonal(self.fit) if by_diagonal else np.arange(len(self.fit))
            self._factors[key] = factorized(self.fit, damping, order, pool)
        return self._factors[key]


def _by_diagonal(hessian: np.ndarray) -> np.ndarray:
    """Columns so that blocks stay together: the heaviest first, and in each the heaviest column."""
    blocks = np.diag(hessian).reshape(-1, block_width(len(hessian)))
    inside = np.argsort(-blocks, 1, kind="stable")
    return np.concatenate([inside[b] + b * blocks.shape[1] for b in np.argsort(-blocks.sum(1), kind="stable")])


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
    damping: float = DAMPING,
    orders: Sequence[bool] = ORDERS,
    sweeps: int = _SWEEPS,
    threads: int = 1,
) -> Compensated:
    """Round a matrix (n, d) float32 to `type`.

    importance: (d,) float32, as ggml weighs errors where it rounds plainly; None: alike. damping: see factor.ridge. orders: by
    diagonal or not; of several the best by the held-back loss of some of the rows is taken. The result does not depend on
    `threads`, each of which works best where BLAS has a single one.
    Raises QuantizeError: weights that are not finite or too large for the type, a type whose codes stand for groups
    (codes.can_change), statistics of other columns or that are not positive definite.
    """
    shape = form(type)
    d = weights.shape[1]
    if hessian.fit.shape != (d, d) or hessian.held.shape[1:] != (d,):
        raise QuantizeError(
            f"the statistics are of {hessian.fit.shape[0]} columns, the weights have {d}: they are of another model."
        )
    if not np.isfinite(weights).all():
        raise QuantizeError("the weights hold NaN or infinity.")

    def plain(part: np.ndarray) -> np.ndarray:
        return _encoded(part, type, importance)

    with ThreadPoolExecutor(threads) as pool:
        data_plain, loss_plain = _rounded(weights, type, plain, hessian, pool)

        def again(by_diagonal: bool) -> Callable[[np.ndarray], np.ndarray]:
            factor = hessian.factor(damping, by_diagonal, pool)
            return lambda part: _compensated(part, shape, factor, hessian.fit, sweeps)

        def tried(by_diagonal: bool) -> float:
            return _rounded(sample, type, again(by_diagonal), hessian, pool, _SAMPLE_TILE)[1]

        sample = weights[:: -(-len(weights) // _SAMPLE)]
        by_diagonal = min(orders, key=tried) if len(orders) > 1 else orders[0]
        data, loss = _rounded(weights, type, again(by_diagonal), hessian, pool)
    kept = loss < loss_plain
    return Compensated(data if kept else data_plain, loss_plain, min(loss, loss_plain), damping, by_diagonal, kept)


def _rounded(
    weights: np.ndarray,
    type: TensorType,
    round: Callable[[np.ndarray], np.ndarray],
    hessian: Hessian,
    pool: Executor,
    tile: int = _TILE,
) -> tuple[np.ndarray, float]:
    """Rows rounded tile by tile, and what they lose on the held-back inputs."""
    n, d = weights.shape
    out = np.empty((n, type.row_bytes(d)), np.uint8)

    def do(start: int) -> float:
        part = np.array(weights[start : start + tile], np.float32, order="C")
        data = out[start : start + tile] = round(part)
        error = part - rows.decode(data, type, np.empty(part.size, np.float32))
        with np.errstate(over="ignore", invalid="ignore"):
            seen = error @ hessian.held.T
            loss = float(np.einsum("ij,ij->", seen, seen, dtype=np.float64))
        if not rows.is_sound(data, type) or not np.isfinite(loss):
            raise QuantizeError(f"the weights are too large for {type.name}. Choose another type for them.")
        return loss

    return out, sum(pool.map(do, range(0, n, tile))) / hessian.n_held


def _encoded(part: np.ndarray, type: TensorType, importance: np.ndarray | None) -> np.ndarray:
    """Rows as ggml rounds them: (n, bytes per row)."""
    out = np.empty(len(part) * type.row_bytes(part.shape[1]), np.uint8)
    return rows.encode(part, type, importance, out).reshape(len(part), -1)


def _compensated(part: np.ndarray, shape: Form, factor: Factor, hessian: np.ndarray, sweeps: int) -> np.ndarray:
    data = feedback(part, shape, factor)
    rounded = Rounded.read(shape, part, data)
    added = ridge(hessian, factor.damping)
    for _ in range(sweeps):
        sweep(rounded, hessian, added)
    rounded.write(data)
    return data


def feedback(weights: np.ndarray, shape: Form, factor: Factor) -> np.ndarray:
    """(n, bytes per row) uint8 of weights (n, d): rounded with error feedback.

    ggml searches the scales of each block for the weights as the blocks before have corrected them, with what an error costs
    that later columns make up for.
    """
    n, d = weights.shape
    width = block_width(d)
    out = np.empty((n, d // width, shape.type.row_bytes(width)), np.uint8)
    errors = np.empty_like(weights)  # in the order of the factor
    codes = np.empty((n, width), np.uint8)
    costs = np.empty(d, np.float32)
    costs[factor.order] = factor.remains / factor.remains.mean()
    for start in range(0, d, width):
        own = slice(start, start + width)
        original = np.take(weights, factor.order[own], 1)
        now = original + errors[:, :start] @ factor.feedback[:start, own]
        block, inside = factor.order[start] // width, factor.order[own] % width
        values = np.empty((n, width), np.float32)
        values[:, inside] = now
        data = _encoded(values, shape.type, costs[block * width : (block + 1) * width])
        scales = shape.scales(data)
        steps, offsets = scales.steps(), scales.offsets()
        offsets = np.zeros_like(steps) if offsets is None else offsets
        made = np.empty_like(now)
        within = np.ascontiguousarray(factor.feedback[own, own])
        feed_back(now, original, made, codes, inside, shape.group, steps, offsets, within, shape.kernel_levels)
        errors[:, own] = made
        shape.put_codes(data, codes)
        out[:, block] = data
    return out.reshape(n, -1)
