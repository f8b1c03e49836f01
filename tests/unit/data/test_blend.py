"""Blends: shares are exact to within one window, each corpus runs through whole epochs, and data.train is parsed."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.config import DataConfig, read_config, write_config
from megamtp.data.blend import PERIOD, Blend, interleave, windows_per_period
from megamtp.data.windows import Windows
from megamtp.errors import InputError
from tests.unit.data.test_windows import Tokens

WEIGHTS = st.lists(st.floats(1e-7, 1e7), min_size=1, max_size=7)


@settings(max_examples=200, deadline=None)
@given(WEIGHTS)
def test_shares_are_nearest_to_the_weights(weights):
    shares, exact = windows_per_period(weights), np.array(weights) / math.fsum(weights) * PERIOD
    assert shares.sum() == PERIOD and shares.min() >= 1
    assert (np.abs(shares - exact) <= 1).all() or (exact < 1).any()


@settings(max_examples=12, deadline=None)
@given(WEIGHTS)
def test_every_prefix_is_within_one_window_of_the_shares(weights):
    shares = windows_per_period(weights)
    corpora, lengths = interleave(shares), np.arange(1, PERIOD + 1)
    for corpus, share in enumerate(shares.tolist()):
        taken = np.cumsum(corpora == corpus)
        assert (np.abs(taken * PERIOD - lengths * share) <= PERIOD).all()
        assert taken[-1] == share


def test_each_corpus_runs_through_its_own_epochs():
    """Blends corpora of 40, 5 and 1000 windows as 1 : 1 : 2, across the end of a period."""
    sizes, firsts = [40, 5, 1000], [0, 10_000, 20_000]
    corpora = [
        Windows(Tokens(size * 2 + 1, list(range(first, first + size * 2 + 1))), 2, 1, seed=4, stream=stream)
        for stream, (size, first) in enumerate(zip(sizes, firsts, strict=True))
    ]
    blend = Blend(corpora, [1, 1, 2])
    start = PERIOD - 200
    first_tokens = [int(window.inputs[0]) for window in blend.windows_at(np.arange(start, start + 400))]
    for corpus, size, first, share in zip(corpora, sizes, firsts, (0.25, 0.25, 0.5), strict=True):
        own = [token for token in first_tokens if first <= token < first + 10_000]
        before = round(start * share)
        assert len(own) == 400 * share
        expected = corpus.windows_at(np.arange(before, before + len(own)))
        assert own == [int(window.inputs[0]) for window in expected]
        epoch = own[-before % size :][:size]
        assert len(set(epoch)) == len(epoch)
    shuffled = np.random.default_rng(0).permutation(400)
    windows = blend.windows_at(start + shuffled)
    assert [int(window.inputs[0]) for window in windows] == [first_tokens[index] for index in shuffled]


def test_window_counts_and_first_windows():
    blend = Blend([Windows(Tokens(11), 2, 1, seed=0), Windows(Tokens(21), 2, 1, seed=0, stream=1)], [0.3, 0.7])
    assert blend.count_windows(0) == [0, 0] and blend.count_windows(2 * PERIOD) == [2 * 19661, 2 * 45875]
    for number in (1, 7, 1000, PERIOD + 1000):
        first, second = blend.count_windows(number)
        assert first + second == number and abs(first - 0.3 * number) <= 1
    later = Blend(blend.corpora, [0.3, 0.7], [3, 8])
    for corpus, first_window in enumerate(later.first_windows):
        (expected,) = blend.corpora[corpus].windows_at(np.array([first_window]))
        first_index = interleave(later.shares).tolist().index(corpus)
        (window,) = later.windows_at(np.array([first_index]))
        assert int(window.inputs[0]) == int(expected.inputs[0])
    assert not blend.targets_can_be_ignored
    assert Blend([blend.corpora[0], Windows(Tokens(11), 2, 2, seed=0)], [1, 1]).targets_can_be_ignored


@pytest.mark.parametrize(
    ("train", "corpora"),
    [
        ("a/train", [(1.0, "a/train")]),
        ("my corpus/train", [(1.0, "my corpus/train")]),
        ("writer's/train", [(1.0, "writer's/train")]),
        ("0.7 a/train 0.3 b/train", [(0.7, "a/train"), (0.3, "b/train")]),
        ("2 'my corpus/train'\n1e-1 b", [(2.0, "my corpus/train"), (0.1, "b")]),
    ],
)
def test_data_train_is_parsed(train, corpora):
    assert DataConfig(train=train).train_corpora == corpora


@pytest.mark.parametrize("train", ["0.7 a 0.3", "0.7 a b 0.3", "0 a 1 b", "-1 a 1 b", "nan a 1 b", "inf a 1 b"])
def test_bad_data_train_is_refused(train):
    with pytest.raises(InputError, match=rf"^data\.train={train}; expected WEIGHT PREFIX .*$"):
        _ = DataConfig(train=train).train_corpora


def test_weights_whose_sum_overflows_are_refused():
    assert DataConfig(train="8e307 a 8e307 b").train_corpora == [(8e307, "a"), (8e307, "b")]
    with pytest.raises(
        InputError, match=r"^data\.train=1e308 a 1e308 b; expected weights whose sum is a finite number$"
    ):
        _ = DataConfig(train="1e308 a 1e308 b").train_corpora


def test_blend_in_a_written_configuration_has_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config([*SMALL, "data.train=0.7 a/train 0.3 'my corpus/train'", "data.documents=mask"])
    write_config(config, tmp_path / "config.yaml")
    again = read_config([str(tmp_path / "config.yaml")])
    expected = [(0.7, str(tmp_path / "a/train")), (0.3, str(tmp_path / "my corpus/train"))]
    assert again.data.train_corpora == expected
    assert dataclasses.replace(again.data, train="") == dataclasses.replace(config.data, train="")
    with pytest.raises(InputError, match=r"^data\.documents=mix; expected continue or mask or isolate$"):
        read_config([*SMALL, "data.train=a", "data.documents=mix"])
    with pytest.raises(InputError, match=r"^data\.train with 1025 corpora; expected at most 1024$"):
        read_config([*SMALL, f"data.train={'1 a ' * 1025}"])


SMALL = [str(Path(__file__).parents[3] / "configs/quickstart.yaml"), "run.directory=r"]
