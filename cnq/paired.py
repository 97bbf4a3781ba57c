"""Two roundings of one model on the same tokens: how much less one loses, with the error that a paired comparison has.

The figures of both rise and fall together from text to text; their ratio hardly does. Intervals: percentiles of a bootstrap
over chunks (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13), which are taken as independent, not tokens.
"""

from dataclasses import dataclass

import numpy as np

from .errors import EngineError
from .evaluate import Measured

_DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """value, and between low and high with 95 % probability."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """What a file loses against another on the same tokens.

    plain, mine: mean KLD in nats; median_plain, median_mine: the median. kld, median: mine / plain.
    top_plain, top_mine: same top token, in percent; top: the difference, in points.
    better: in how many chunks the mean KLD is less.
    """

    plain: float
    mine: float
    kld: Interval
    median_plain: float
    median_mine: float
    median: Interval
    top_plain: float
    top_mine: float
    top: Interval
    better: int
    n_chunks: int


def compare(plain: Measured, mine: Measured, n_chunks: int) -> Paired:
    """Both were measured against the same base on the same chunks. The same arguments give the same figures."""
    if plain.klds is None or mine.klds is None or plain.same is None or mine.same is None:
        raise EngineError("a paired comparison takes two files that were measured against a base.")
    klds = np.stack([m.klds.reshape(n_chunks, -1) for m in (plain, mine) if m.klds is not None])  # (2, chunks, tokens)
    same = np.stack([m.same.reshape(n_chunks, -1) for m in (plain, mine) if m.same is not None])
    draws = np.random.default_rng(0).integers(0, n_chunks, (_DRAWS, n_chunks))
    means, tops = klds.mean(2), 100 * same.mean(2)
    drawn = means[:, draws].mean(2)  # (2, draws)
    medians = np.array([np.median(klds[:, draw].reshape(2, -1), axis=1) for draw in draws]).T
    points = tops[:, draws].mean(2)
    (a, b), (c, d), (e, f) = means.mean(1), np.median(klds.reshape(2, -1), axis=1), tops.mean(1)
    return Paired(
        plain=float(a),
        mine=float(b),
        kld=_interval(b / a, drawn[1] / drawn[0]),
        median_plain=float(c),
        median_mine=float(d),
        median=_interval(d / c, medians[1] / medians[0]),
        top_plain=float(e),
        top_mine=float(f),
        top=_interval(f - e, points[1] - points[0]),
        better=int((means[1] < means[0]).sum()),
        n_chunks=n_chunks,
    )


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))
