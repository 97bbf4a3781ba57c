"""The knapsack solver, against every choice of small instances."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cnq.allocate.knapsack import solve

ITEMS = st.lists(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 4000)), min_size=1, max_size=4), min_size=1, max_size=5
)


def best(costs, sizes, budget, least):
    """The least cost of all choices within bounds, None when there is none."""
    choices = itertools.product(*(range(len(c)) for c in costs))
    fitting = (pick for pick in choices if least <= sum(s[i] for s, i in zip(sizes, pick, strict=True)) <= budget)
    return min((sum(c[i] for c, i in zip(costs, pick, strict=True)) for pick in fitting), default=None)


@settings(max_examples=150, deadline=None)
@given(items=ITEMS, unit=st.sampled_from([1, 32, 100_000]), share=st.floats(-0.1, 1.1), filled=st.sampled_from([0.0, 0.9]))
@example(items=[[(0, 71), (0, 142)]], unit=1, share=1.0, filled=0.9)  # bounds between two multiples of what sizes share
@example(items=[[(0, 71), (0, 142)]], unit=1, share=0.5, filled=0.9)
def test_the_answer_is_the_best_of_all(items, unit, share, filled):
    costs = [[cost / 7 for cost, _ in item] for item in items]
    sizes = [[size * unit for _, size in item] for item in items]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    budget = int(low + share * (high - low))
    least = int(filled * budget)
    found = solve(costs, sizes, budget, least)
    expected = best(costs, sizes, budget, least)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.size == sum(s[i] for s, i in zip(sizes, found.chosen, strict=True))
    assert least <= found.size <= budget
    assert found.cost == pytest.approx(sum(c[i] for c, i in zip(costs, found.chosen, strict=True)))
    assert found.cost == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert found.gap <= 1e-5


def test_as_many_tensors_as_a_large_model_has_take_seconds_and_are_near_the_optimum():
    """560 items of 7, as a 70B model has them."""
    bits = (84, 110, 136, 144, 176, 210, 272)
    weights = [4096 * 4096 * (1 + i % 7) // 256 for i in range(560)]
    costs = [[(1 + i * 37 % 101) * 4.0 ** -(b / 32) for b in bits] for i in range(560)]
    sizes = [[w * b for b in bits] for w in weights]
    budget = sum(w * 150 for w in weights)
    found = solve(costs, sizes, budget)
    assert found is not None
    assert 0.9999 * budget < found.size <= budget
    assert found.gap < 1e-4
    assert solve(costs, sizes, budget) == found
