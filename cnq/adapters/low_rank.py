"""What a low-rank change does to a matrix: the formulas and roundings of PEFT's merge_and_unload in float32."""

import numpy as np

from ..gguf_file import CHUNK_ELEMENTS
from .adapter import LowRank, floats
from .arithmetic import lengths, product


def add(values: np.ndarray, change: LowRank, transposed: bool = False) -> float:
    """Add a change to a float32 matrix, in place; returns ‖change‖ / ‖matrix‖ (Frobenius).

    transposed: the matrix is stored as (columns, rows), as GPT-2's layers are (fan_in_fan_out).
    DoRA (https://arxiv.org/abs/2402.09353): the sum is then brought to the lengths that were trained, row by row; an
    embedding, whose rows are inputs, column by column.
    """
    delta = product(floats(change.b[1]()), floats(change.a[1]()))
    delta *= np.float32(change.scale)
    across = change.embedding or transposed
    if across:
        delta = delta.T
    before = float(np.linalg.norm(values))
    values += delta
    if change.magnitude is None:
        moved = float(np.linalg.norm(delta))
    else:
        factors = floats(change.magnitude[1]()) / lengths(values, axis=0 if across else 1)
        factors = factors[None, :] if across else factors[:, None]
        moved = _distance(values, delta, factors)
        values *= factors
    return moved / max(before, float(np.finfo(np.float32).tiny))


def _distance(total: np.ndarray, delta: np.ndarray, factors: np.ndarray) -> float:
    """‖factors · total - (total - delta)‖, a few rows at a time."""
    squares = 0.0
    factors = np.broadcast_to(factors - np.float32(1), total.shape)
    step = max(1, CHUNK_ELEMENTS // total.shape[1])
    for start in range(0, len(total), step):
        part = slice(start, start + step)
        squares += float(np.linalg.norm(total[part] * factors[part] + delta[part])) ** 2
    return squares**0.5
