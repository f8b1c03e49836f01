"""Shuffle: a permutation for every size and key, statistically random, and as fast for large sizes as for small."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.data.shuffle import Shuffle


def permutation(size: int, *key: int) -> list[int]:
    return Shuffle(size, *key)(np.arange(size)).tolist()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 9))
def test_is_a_permutation(size, seed, epoch):
    assert sorted(permutation(size, seed, epoch)) == list(range(size))


def test_the_order_never_changes():
    """Resumed runs depend on it: a change would make them train on other data."""
    assert permutation(10, 0, 0, 0) == [5, 6, 0, 4, 3, 1, 7, 8, 2, 9]
    assert Shuffle(10**12, 1, 2, 3)(np.array([0, 1, 10**12 - 1])).tolist() == [137775179030, 10506700383, 351725124451]


def test_all_orders_of_four_are_equally_likely():
    counts = dict.fromkeys(permutations(range(4)), 0)
    for seed in range(2400):
        counts[tuple(permutation(4, seed))] += 1
    assert min(counts.values()) > 55 and max(counts.values()) < 155  # expected 100 each, standard deviation 10


def test_neighbouring_values_are_uncorrelated():
    """For a random permutation of 10^5 values, the standard deviation of these correlations is 0.003."""
    values = np.array(permutation(100_000, 5, 0))
    for lag in (1, 2, 317, 50_000):
        assert abs(np.corrcoef(values, np.roll(values, lag))[0, 1]) < 0.02
    assert abs(np.corrcoef(values, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(values, permutation(100_000, 5, 1))[0, 1]) < 0.02
    assert abs((values == np.arange(100_000)).sum() - 1) < 8  # fixed points: Poisson of mean 1


@pytest.mark.parametrize("size", [2**40 - 1, 2**40, 2**40 + 1, 10**12])
def test_large_sizes(size):
    indices = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    values = Shuffle(size, 7)(indices)
    assert values.min() >= 0 and values.max() < size
    assert len(set(values.tolist())) == len(indices)
    assert abs(values.mean() / size - 0.5) < 0.02
