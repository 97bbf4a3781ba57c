"""Paired comparisons: plain means and medians, and intervals that a bootstrap over chunks gives."""

from pathlib import Path

import numpy as np
import pytest

from cnq.errors import EngineError
from cnq.evaluate import Measured
from cnq.paired import compare
from cnq.scores import Estimate

N_CHUNKS, N = 20, 50


def measured(klds: np.ndarray | None, same: np.ndarray | None) -> Measured:
    return Measured(Path("x.gguf"), 1, 4.5, Estimate(1, 0), 1.0, None, klds, same)


@pytest.fixture
def both():
    random = np.random.default_rng(3)
    plain = random.lognormal(-2, 1, (N_CHUNKS, N)) * random.lognormal(0, 0.5, (N_CHUNKS, 1))
    mine = plain * random.lognormal(-0.5, 0.4, plain.shape)
    same = random.random((2, N_CHUNKS, N)) < np.array([0.7, 0.8])[:, None, None]
    return plain, mine, same


def test_figures_are_those_of_numpy_and_scipys_bootstrap(both):
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    plain, mine, same = both
    p = compare(measured(plain.ravel(), same[0].ravel()), measured(mine.ravel(), same[1].ravel()), N_CHUNKS)
    assert (p.plain, p.mine) == (pytest.approx(plain.mean()), pytest.approx(mine.mean()))
    assert p.kld.value == pytest.approx(mine.mean() / plain.mean())
    assert p.median.value == pytest.approx(np.median(mine) / np.median(plain))
    assert p.top.value == pytest.approx(100 * (same[1].mean() - same[0].mean()))
    assert p.better == (mine.mean(1) < plain.mean(1)).sum()

    def ratio(a, b):
        return b.mean() / a.mean()

    chunks = (plain.mean(1), mine.mean(1))
    known = bootstrap(chunks, ratio, paired=True, vectorized=False, method="percentile", n_resamples=4000, rng=1)
    width = known.confidence_interval.high - known.confidence_interval.low
    assert p.kld.low == pytest.approx(known.confidence_interval.low, abs=0.1 * width)
    assert p.kld.high == pytest.approx(known.confidence_interval.high, abs=0.1 * width)
    assert p.top.low < p.top.value < p.top.high
    assert p.median.low < p.median.value < p.median.high


def test_the_same_file_twice_differs_in_nothing(both):
    plain, _, same = both
    m = measured(plain.ravel(), same[0].ravel())
    p = compare(m, m, N_CHUNKS)
    assert (p.kld.low, p.kld.value, p.kld.high) == (1, 1, 1)
    assert (p.top.low, p.top.high, p.better) == (0, 0, 0)


def test_files_without_a_base_cannot_be_compared():
    with pytest.raises(EngineError, match="against a base"):
        compare(measured(None, None), measured(None, None), 2)
