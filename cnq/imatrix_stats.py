"""Statistics of an importance matrix: the table of llama-imatrix --show-statistics."""

from dataclasses import dataclass

import numpy as np

from .imatrix_file import Importance


@dataclass(frozen=True)
class Statistics:
    """One tensor's line of llama-imatrix --show-statistics.

    total, least, most, mean, deviation: of E[x²] over its columns. active: share above 1e-5. entropy: bits. zd: share of
    columns more than one deviation above the mean. cosine: similarity to the same tensor one layer before; 0 for the first.
    """

    name: str
    n: int
    total: float
    least: float
    most: float
    mean: float
    deviation: float
    active: float
    entropy: float
    zd: float
    cosine: float


def statistics(importance: Importance) -> list[Statistics]:
    """Statistics of every tensor, in the file's order. Formulas: llama.cpp tools/imatrix/imatrix.cpp, compute_statistics."""
    found = []
    for name, sums in importance.sums.items():
        counts = importance.counts[name]
        if not (counts > 0).any():
            continue
        means = (sums[counts > 0] / counts[counts > 0, None]).ravel().astype(np.float64)
        total = means.sum()
        shares = means[means > 0] / total if total > 0 else np.zeros(0)
        deviation = float(means.std())
        found.append(
            Statistics(
                name=name,
                n=means.size,
                total=float(total),
                least=float(means.min()),
                most=float(means.max()),
                mean=float(means.mean()),
                deviation=deviation,
                active=float((means > 1e-5).mean()),
                entropy=float(-(shares * np.log2(shares)).sum()),
                zd=float(((means - means.mean()) / deviation > 1).mean()) if deviation > 0 else 0.0,
                cosine=_cosine(importance, name),
            )
        )
    return found


def _cosine(importance: Importance, name: str) -> float:
    parts = name.split(".")
    if parts[0] != "blk" or not parts[1].isdecimal():
        return 0.0
    before = importance.sums.get(".".join(["blk", str(int(parts[1]) - 1), *parts[2:]]))
    if before is None:
        return 0.0
    a, b = importance.sums[name].ravel().astype(np.float64), before.ravel().astype(np.float64)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else 0.0
