"""One type for each tensor, the least loss within a size: the multiple-choice knapsack problem, by HiGHS.

HiGHS (Huangfu and Hall, doi:10.1007/s12532-017-0130-5) through scipy.optimize.milp: branch and bound, which says how far its
best answer can be from the optimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import QuantizeError

_GAP = 1e-6  # of the loss; at which the search may end
_NODES = 20_000  # of the search tree; a number and not a time, so that the answer does not depend on the machine


@dataclass(frozen=True)
class Solution:
    """chosen: for each item the index of its choice. gap: (cost - bound) / cost, 0 when the optimum is proved."""

    chosen: tuple[int, ...]
    cost: float
    size: int
    gap: float


def solve(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int, least: int = 0) -> Solution | None:
    """Choose one of each item's alternatives so that the sizes sum up to at most `budget` and the costs to the least.

    least: what the sizes should come to at least; None is returned when that, or the budget, cannot be met.
    """
    import scipy.optimize
    import scipy.sparse

    kept = [_useful(c, s) if not least else list(range(len(c))) for c, s in zip(costs, sizes, strict=True)]
    cost = np.array([c[i] for c, keep in zip(costs, kept, strict=True) for i in keep])
    size = np.array([s[i] for s, keep in zip(sizes, kept, strict=True) for i in keep], np.float64)
    if size.size == 0:
        return Solution((), 0.0, 0, 0.0) if least <= 0 <= budget else None
    unit = float(np.gcd.reduce(size.astype(np.int64)))
    scale = float(cost.max()) or 1.0
    item = np.repeat(np.arange(len(kept)), [len(keep) for keep in kept])
    each = scipy.sparse.csr_array((np.ones(len(item)), (item, np.arange(len(item)))))
    found = scipy.optimize.milp(
        cost / scale,
        integrality=np.ones(len(cost)),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(each, 1, 1),
            scipy.optimize.LinearConstraint(size[None] / unit, -(-least // unit), budget // unit),
        ],
        options={"mip_rel_gap": _GAP, "node_limit": _NODES},
    )
    if found.x is None:
        if found.status == 2:  # infeasible
            return None
        raise QuantizeError(f"the search for an allocation ended without one: {found.message} Please report it.")
    picked = np.flatnonzero(found.x > 0.5)
    chosen = tuple(kept[i][n] for i, n in zip(item[picked], _places(item)[picked], strict=True))
    total = sum(c[i] for c, i in zip(costs, chosen, strict=True))
    nbytes = sum(s[i] for s, i in zip(sizes, chosen, strict=True))
    if nbytes > budget:  # by HiGHS's tolerance of 1e-6 on each alternative
        return solve(costs, sizes, budget - (nbytes - budget), least)
    bound = float(found.mip_dual_bound) * scale
    return Solution(chosen, total, nbytes, max(0.0, (total - bound) / total) if total > 0 else 0.0)


def _places(item: np.ndarray) -> np.ndarray:
    """The place of each alternative among those of its item."""
    first = np.flatnonzero(np.r_[True, item[1:] != item[:-1]])
    return np.arange(len(item)) - np.repeat(first, np.diff(np.r_[first, len(item)]))


def _useful(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Alternatives that no other beats in both; the others can be in no best answer."""
    order = sorted(range(len(costs)), key=lambda i: (sizes[i], costs[i], i))
    kept: list[int] = []
    for i in order:
        if not kept or costs[i] < costs[kept[-1]]:
            kept.append(i)
    return sorted(kept)
