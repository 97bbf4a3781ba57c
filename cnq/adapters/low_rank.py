"""What a low-rank change does to a matrix: the formulas and roundings of PEFT's merge_and_unload in float32."""

from collections.abc import Callable

import numpy as np

from ..gguf_file import CHUNK_ELEMENTS
from .adapter import LowRank, floats
from .arithmetic import lengths, product


def adds_by_rows(change: LowRank, transposed: bool) -> bool:
    """Whether what becomes of a row depends on that row alone, and on the same row of b."""
    return not (change.embedding or transposed or change.magnitude)


def adding(change: LowRank) -> Callable[[np.ndarray, slice], tuple[float, float]]:
    """What adds a change to some rows of a float32 matrix, in place, and returns (‖change‖², ‖rows‖²)."""
    a, b = floats(change.a[1]()), floats(change.b[1]())

    def add(values: np.ndarray, rows: slice) -> tuple[float, float]:
        delta = product(b[rows], a)
        delta *= np.float32(change.scale)
        before = float(np.vdot(values, values))
        values += delta
        return float(np.vdot(delta, delta)), before

    return add


def add(values: np.ndarray, change: LowRank, transposed: bool = False) -> tuple[float, float]:
    """Add a change to a whole float32 matrix, in place; returns (‖change‖², ‖matrix‖²).

    transposed: the matrix is stored as (columns, rows), as GPT-2's layers are (fan_in_fan_out).
    DoRA (https://arxiv.org/abs/2402.09353): the sum is then brought to the lengths that were trained, row by row; an
    embedding, whose rows are inputs, column by column.
    """
    if adds_by_rows(change, transposed):
        return adding(change)(values, slice(None))
    delta = product(floats(change.b[1]()), floats(change.a[1]()))
    delta *= np.float32(change.scale)
    across = change.embedding or transposed
    if across:
        delta = delta.T
    before = float(np.vdot(values, values))
    values += delta
    if change.magnitude is None:
        return float(np.linalg.norm(delta)) ** 2, before
    factors = floats(change.magnitude[1]()) / lengths(values, axis=0 if across else 1)
    factors = factors[None, :] if across else factors[:, None]
    moved = _distance(values, delta, factors)
    values *= factors
    return moved, before


def _distance(total: np.ndarray, delta: np.ndarray, factors: np.ndarray) -> float:
    """‖factors · total - (total - delta)‖², a few rows at a time."""
    squares = 0.0
    factors = np.broadcast_to(factors - np.float32(1), total.shape)
    step = max(1, CHUNK_ELEMENTS // total.shape[1])
    for start in range(0, len(total), step):
        part = slice(start, start + step)
        squares += float(np.linalg.norm(total[part] * factors[part] + delta[part])) ** 2
    return squares
