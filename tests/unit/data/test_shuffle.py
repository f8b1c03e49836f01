"""The shuffle: a permutation of every size, another for every key, without a preference, and no slower for being
large.
"""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.data.shuffle import Shuffle


def whole(number: int, *key: int) -> list[int]:
    return Shuffle(number, *key)(np.arange(number)).tolist()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 9))
def test_is_a_permutation(number, seed, epoch):
    assert sorted(whole(number, seed, epoch)) == list(range(number))


def test_the_order_is_fixed_for_ever():
    """Resumed runs rely on it: a change here changes the data that they would see."""
    assert whole(10, 0, 0, 0) == [5, 6, 0, 4, 3, 1, 7, 8, 2, 9]
    assert Shuffle(10**12, 1, 2, 3)(np.array([0, 1, 10**12 - 1])).tolist() == [137775179030, 10506700383, 351725124451]


def test_every_order_of_four_is_about_as_likely():
    counts = dict.fromkeys(permutations(range(4)), 0)
    for seed in range(2400):
        counts[tuple(whole(4, seed))] += 1
    assert min(counts.values()) > 55 and max(counts.values()) < 155  # 100 each, deviation 10


def test_neighbours_are_strangers():
    """Correlations of a permutation of 10^5 drawn at random have a deviation of 0.003."""
    values = np.array(whole(100_000, 5, 0))
    for lag in (1, 2, 317, 50_000):
        assert abs(np.corrcoef(values, np.roll(values, lag))[0, 1]) < 0.02
    assert abs(np.corrcoef(values, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(values, whole(100_000, 5, 1))[0, 1]) < 0.02
    assert abs((values == np.arange(100_000)).sum() - 1) < 8  # fixed points: Poisson of mean 1


@pytest.mark.parametrize("number", [2**40 - 1, 2**40, 2**40 + 1, 10**12])
def test_large_numbers(number):
    places = np.concatenate([np.arange(5000), number - 1 - np.arange(5000)])
    values = Shuffle(number, 7)(places)
    assert values.min() >= 0 and values.max() < number
    assert len(set(values.tolist())) == len(places)
    assert abs(values.mean() / number - 0.5) < 0.02
