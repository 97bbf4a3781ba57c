"""Compensated rounding: against all roundings of a small case, against ggml's decoder, and what it must never do."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codes import NAMES

from cnq.engine import codes, compensate, rows
from cnq.engine.compensate import Hessian
from cnq.engine.factor import factorized, ridge
from cnq.engine.kernels import half
from cnq.engine.refine import Rounded, sweep
from cnq.errors import QuantizeError
from cnq.gguf_file import TYPE_BY_NAME, TensorType

D = 512
DAMPING = 0.05


def inputs(n: int, seed: int, d: int = D) -> np.ndarray:
    """Inputs as layers have them: columns that go together, and of very different size."""
    random = np.random.default_rng(0)  # the same layer, whatever the seed
    mix = random.normal(0, 0.3, (d, d)) + 3 * np.eye(d)
    sizes = np.exp(random.normal(size=d))
    return (np.random.default_rng(seed).normal(size=(n, d)) * sizes @ mix).astype(np.float32)


@pytest.fixture(scope="module")
def hessian() -> Hessian:
    fit, held = inputs(2048, 1), inputs(1024, 2)
    return Hessian(fit.T @ fit, held, len(fit), len(held))


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return (np.random.default_rng(3).standard_t(5, size=(96, D)) * 0.02).astype(np.float32)


def plain(weights: np.ndarray, type: TensorType, importance: np.ndarray | None = None) -> np.ndarray:
    out = np.empty(len(weights) * type.row_bytes(weights.shape[1]), np.uint8)
    return rows.encode(weights, type, importance, out).reshape(len(weights), -1)


def decoded(data: np.ndarray, type: TensorType, d: int = D) -> np.ndarray:
    return rows.decode(np.ascontiguousarray(data), type, np.empty(len(data) * d, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_the_output_changes_less_on_rows_that_were_held_back(name, hessian, weights):
    type = TYPE_BY_NAME[name]
    importance = np.ascontiguousarray(np.diag(hessian.fit)) / hessian.n_fit
    found = compensate.compensate(weights, type, importance, hessian, damping=0.03, orders=(False,))
    assert found.kept
    x = inputs(1024, 2)  # the held-back ones themselves
    loss, loss_plain = (
        float((((weights - decoded(data, type)) @ x.T) ** 2).sum() / len(x))
        for data in (found.rows, plain(weights, type, importance))
    )
    assert found.loss == pytest.approx(loss, rel=1e-3)
    assert found.loss_plain == pytest.approx(loss_plain, rel=1e-3)
    assert loss < 0.35 * loss_plain


@pytest.mark.parametrize(("d", "name"), [(96, "Q5_1"), (160, "IQ4_NL"), (576, "Q8_0"), (576, "Q4_0"), (768, "Q3_K")])
@pytest.mark.parametrize("by_diagonal", [False, True])
def test_rows_of_any_length_and_any_number_of_them(d, name, by_diagonal):
    """Blocks of less than 256 columns; a tile of one row."""
    type = TYPE_BY_NAME[name]
    fit, held = inputs(2048, 1, d), inputs(1024, 2, d)
    weights = (np.random.default_rng(3).standard_t(5, size=(compensate._TILE + 1, d)) * 0.02).astype(np.float32)
    weights.setflags(write=False)  # as in a file that is mapped
    hessian = Hessian(fit.T @ fit, held, len(fit), len(held))
    found = compensate.compensate(weights, type, None, hessian, damping=0.03, orders=(by_diagonal,))
    error = weights - decoded(found.rows, type, d)
    assert found.kept and found.loss < 0.5 * found.loss_plain
    assert found.loss == pytest.approx(np.square(error @ held.T).sum() / len(held), rel=1e-3)


def test_feedback_against_every_rounding_there_is():
    """Six inputs that are not zero, in one group of Q3_K: 8^6 roundings for each row, with the scales that ggml gives."""
    type, live = TYPE_BY_NAME["Q3_K"], np.arange(64, 76, 2)
    form = codes.form(type)
    random = np.random.default_rng(5)
    x = np.zeros((64, 256), np.float32)
    x[:, live] = random.normal(size=(64, 6)) + 2 * random.normal(size=(64, 1))
    h = x.T @ x
    w = random.normal(size=(16, 256)).astype(np.float32)
    with ThreadPoolExecutor(1) as pool:
        factor = factorized(h, DAMPING, np.arange(256), pool)
    data = compensate.feedback(w, form, factor)
    before = plain(w, type, factor.remains / factor.remains.mean())  # the same scales, each code by itself
    steps = form.scales(before).steps()
    assert np.array_equal(form.scales(data).steps(), steps)
    damped = h[np.ix_(live, live)] + np.diag(ridge(h, DAMPING)[live])

    def cost(values: np.ndarray, row: int) -> np.ndarray:
        error = w[row, live] - values
        return ((error @ damped) * error).sum(1)

    every = form.levels[np.array(list(product(range(8), repeat=6)))]  # (262144, 6)
    least = np.array([cost(steps[row, live // 16] * every, row).min() for row in range(len(w))])
    ours, theirs = (
        np.array([cost(decoded(d[[row]], type, 256)[:, live], row)[0] for row in range(len(w))]) for d in (data, before)
    )
    assert (ours >= least * (1 - 1e-5)).all()
    assert ours.mean() < 0.7 * theirs.mean()
    assert ours.mean() - least.mean() < 0.2 * (theirs.mean() - least.mean())
    dead = np.delete(np.arange(256), live)  # no input, nothing to make up for: the nearest code
    nearest = np.abs(w[..., None] - np.repeat(steps, 16, 1)[..., None] * form.levels).min(-1)
    assert np.allclose(np.abs(w - decoded(data, type, 256))[:, dead], nearest[:, dead], rtol=1e-5, atol=1e-7)


EXTREMES = st.sampled_from(["zeros", "one value", "one large", "tiny", "large", "negative"])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(kind=EXTREMES, seed=st.integers(0, 99))
def test_what_is_written_is_what_was_meant(name, kind, seed, hessian):
    form = codes.form(TYPE_BY_NAME[name])
    w = np.random.default_rng(seed).normal(size=(4, D)).astype(np.float32)
    w[0] = {"zeros": 0, "one value": 0.7, "one large": w[0] + 900 * (np.arange(D) == seed), "tiny": w[0] * 1e-30,
            "large": w[0] * 1e4, "negative": -np.abs(w[0])}[kind]  # fmt: skip
    w[1, 256:] = w[0, :256]  # and in one of a row's blocks
    data = plain(w, form.type)
    rounded = Rounded.read(form, w, data)
    costs = []
    for _ in range(3):
        costs.append(cost(rounded, hessian.fit))
        sweep(rounded, hessian.fit, ridge(hessian.fit, DAMPING))
    costs.append(cost(rounded, hessian.fit))
    for before, after in pairwise(costs):
        assert (after <= before * (1 + 1e-4) + 1e-30).all()
    rounded.write(data)
    assert rows.is_sound(data, form.type)
    steps, offsets = (np.repeat(part, form.group, 1) for part in rounded.steps_and_offsets())
    values = steps * form.levels[rounded.codes] + offsets
    fused = steps.astype(np.float64) * form.levels[rounded.codes] + offsets  # a compiler may fuse product and sum
    found = decoded(data, form.type)
    assert np.array_equal(found, values) or np.array_equal(found, fused.astype(np.float32))
    assert np.array_equal(rounded.errors, w - values)
    lowest, highest = form.usable
    assert rounded.codes.min() >= lowest and rounded.codes.max() <= highest


@given(st.floats(-65504, 65504) | st.floats(-1e-4, 1e-4) | st.integers(-4096, 4096).map(lambda i: i * 2.0**-25))
def test_half_precision_as_numpy_rounds_to_it(x):
    assert half(x) == np.float64(x).astype(np.float16)


def test_beyond_half_precision_the_largest_is_taken():
    assert (half(65520.0), half(-1e30), half(np.inf)) == (65504, -65504, 65504)


def cost(rounded: Rounded, h: np.ndarray) -> np.ndarray:
    e = rounded.errors.astype(np.float64)
    return np.einsum("ij,ij->i", e @ h.astype(np.float64) + ridge(h, DAMPING) * e, e)


def test_plain_rounding_stays_where_it_is_better_on_the_rows_held_back(hessian, weights):
    """Statistics that say nothing about the inputs to come."""
    type = TYPE_BY_NAME["Q4_K"]
    other = Hessian(hessian.fit, np.eye(D, dtype=np.float32), hessian.n_fit, D)
    found = compensate.compensate(weights, type, None, other, damping=0.001, orders=(False,))
    assert not found.kept
    assert np.array_equal(found.rows, plain(weights, type))
    assert found.loss == found.loss_plain


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0"])
def test_the_number_of_threads_changes_nothing(name, hessian, weights, monkeypatch):
    monkeypatch.setattr(compensate, "_TILE", 32)
    type = TYPE_BY_NAME[name]

    def found(threads: int) -> compensate.Compensated:
        fresh = Hessian(hessian.fit, hessian.held, hessian.n_fit, hessian.n_held)
        return compensate.compensate(weights, type, None, fresh, damping=0.1, orders=(False, True), sweeps=1, threads=threads)

    one, three = found(1), found(3)
    assert np.array_equal(one.rows, three.rows)
    assert (one.loss, one.damping, one.by_diagonal) == (three.loss, three.damping, three.by_diagonal)


def test_the_factor_is_the_statistics_again(hessian):
    order = np.random.default_rng(0).permutation(D)
    with ThreadPoolExecutor(2) as pool:
        factor = factorized(hessian.fit, DAMPING, order, pool)
    again = factor.feedback.astype(np.float64) * factor.remains @ factor.feedback.T
    damped = hessian.fit + np.diag(ridge(hessian.fit, DAMPING))
    assert np.abs(again - damped[np.ix_(order, order)]).max() < 1e-5 * damped.max()
    assert (np.tril(factor.feedback, -1) == 0).all() and (np.diag(factor.feedback) == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e12, 3e38])
def test_numbers_that_cannot_be_stored_are_refused(bad, hessian, weights):
    spoilt = weights.copy()
    spoilt[5, 7] = bad
    with pytest.raises(QuantizeError, match=r"NaN or infinity|too large for Q6_K"):
        compensate.compensate(spoilt, TYPE_BY_NAME["Q6_K"], None, hessian)


def test_statistics_of_another_model_or_of_nothing_are_refused(hessian, weights):
    with pytest.raises(QuantizeError, match="512 columns, the weights have 256"):
        compensate.compensate(weights[:, :256], TYPE_BY_NAME["Q4_K"], None, hessian)
    with pytest.raises(QuantizeError, match="Collect"):
        nothing = Hessian(np.zeros((D, D), np.float32), hessian.held, 0, hessian.n_held)
        compensate.compensate(weights, TYPE_BY_NAME["Q4_K"], None, nothing)
    with pytest.raises(QuantizeError, match="IQ3_S"):
        compensate.compensate(weights, TYPE_BY_NAME["IQ3_S"], None, hessian)
