"""The triangular factor of a layer's input statistics that error feedback runs on.

H = Σ x xᵀ over the inputs x of a matrix. With H = A · diag(D) · Aᵀ, A unit upper triangular, the error E of a row of weights
costs Σ_c D_c (E_c + Σ_{i<c} E_i A_ic)²: each column can make up for those before it, and what remains is weighed by D.
Equal to GPTQ (arXiv 2210.17323), whose Cholesky factor of H⁻¹ is this one's inverse; written this way in QuIP (arXiv
2307.13304, section 3.1), without an inverse.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from ..errors import QuantizeError

_PANEL = 256
_FLOOR = 1e-3


@dataclass(frozen=True)
class Factor:
    """order: (d,) the columns of H in the order in which they are rounded. feedback: (d, d) float32, A; remains: (d,), D.

    feedback and remains are in this order.
    """

    damping: float
    order: np.ndarray
    feedback: np.ndarray
    remains: np.ndarray


def ridge(hessian: np.ndarray, damping: float) -> np.ndarray:
    """(d,) float32: what damping adds to the diagonal, this share of it, so that less is believed of how columns go together.

    Without end it would leave each column alone with its mean square, which is rounding by the importance matrix. A thousandth
    of the mean is added besides, for inputs that were never met. Raises QuantizeError for statistics that cannot be.
    """
    diagonal = np.diag(hessian)
    mean = float(diagonal.mean(dtype=np.float64))
    if not np.isfinite(mean) or mean <= 0:
        raise QuantizeError(f"the mean square of a layer's inputs is {mean}. Collect the statistics again.")
    return damping * diagonal + np.float32(_FLOOR * mean)


def factorized(hessian: np.ndarray, damping: float, order: np.ndarray, pool: Executor) -> Factor:
    """hessian: (d, d) float32, symmetric. damping: see ridge.

    Raises QuantizeError when the statistics are not finite, or not positive definite in spite of the damping.
    """
    work = hessian[np.ix_(order, order)]
    at = np.arange(len(order))
    work[at, at] += ridge(hessian, damping)[order]
    remains = _unit_upper(work, pool)
    return Factor(damping, order, work, remains)


def _unit_upper(work: np.ndarray, pool: Executor) -> np.ndarray:
    """Turn H into A in place, from the last panel of columns to the first; returns D.

    The same products on the same panels whatever the number of threads: the result does not depend on it.
    """
    d = len(work)
    remains = np.empty(d, np.float32)
    for start in range((d - 1) // _PANEL * _PANEL, -1, -_PANEL):
        own = slice(start, min(start + _PANEL, d))
        corner, remains[own] = _corner(work[own, own])
        panel = work[:start, own] @ np.linalg.inv(corner * remains[own]).T.astype(np.float32)  # A · (corner · D)ᵀ = H

        def subtract(rows: slice, panel: np.ndarray = panel, weighed: np.ndarray = panel * remains[own]) -> None:
            work[rows, rows.start : len(panel)] -= weighed[rows] @ panel[rows.start :].T

        _each(pool, subtract, start)
        work[:start, own], work[own, own], work[own, :start] = panel, corner, 0
    return remains


def _each(pool: Executor, do: Callable[[slice], None], n: int) -> None:
    for done in [pool.submit(do, slice(at, min(at + _PANEL, n))) for at in range(0, n, _PANEL)]:
        done.result()


def _corner(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and D of a block of the diagonal, in float64: numpy's lower Cholesky factor of the block turned round."""
    upper = np.triu(block).astype(np.float64)
    full = upper + np.triu(upper, 1).T
    try:
        root = np.linalg.cholesky(full[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError:
        raise QuantizeError(
            "the statistics of a layer's inputs are not positive definite. Collect them from more text, or round plainly."
        ) from None
    scale = np.diag(root)
    return root / scale, scale**2
