"""Windows: every token a target exactly once, whatever n, and IGNORED only beyond the end."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.data import windows as windows_module
from megamtp.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megamtp.data.windows import IGNORED, Windows
from megamtp.errors import InputError


class Tokens:
    """Stands in for an IndexedDataset. By default token i is i, so that a token tells its place."""

    name = "tokens"

    def __init__(self, num_tokens: int, tokens: list[int] | None = None):
        self.num_tokens, self._tokens = num_tokens, np.array(range(num_tokens) if tokens is None else tokens)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop]


@st.composite
def shapes(draw) -> tuple[int, int, int]:
    """(tokens, T, n) with at least one window."""
    length = draw(st.integers(1, 12))
    return draw(st.integers(length + 1, 60)), length, draw(st.integers(1, 8))


@settings(max_examples=100, deadline=None)
@given(shapes())
def test_every_token_is_head_1s_target_exactly_once(shape):
    num_tokens, length, n = shape
    windows = Windows(Tokens(num_tokens), length, n, seed=0)
    targets = torch.cat([windows[int(index)][1][0] for index in windows.shuffled(0)]).sort().values
    assert targets.tolist() == list(range(1, len(windows) * length + 1))
    rest = num_tokens - 1 - len(targets)
    assert 0 <= rest < length


@settings(max_examples=100, deadline=None)
@given(shapes())
def test_targets_follow_their_inputs_and_are_ignored_beyond_the_end_only(shape):
    num_tokens, length, n = shape
    windows = Windows(Tokens(num_tokens), length, n, seed=0)
    ignored = False
    for index in range(len(windows)):
        inputs, targets = windows[index]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == list(range(index * length, (index + 1) * length))
        places = inputs + torch.arange(1, n + 1)[:, None]
        assert torch.equal(targets, torch.where(places < num_tokens, places, IGNORED))
        ignored |= bool((targets == IGNORED).any())
    assert windows.targets_can_be_ignored == ignored


@settings(max_examples=50, deadline=None)
@given(shapes(), st.integers(0, 3), st.integers(0, 3))
def test_number_and_order_do_not_depend_on_n(shape, seed, epoch):
    num_tokens, length, n = shape
    one, many = (Windows(Tokens(num_tokens), length, heads, seed) for heads in (1, n))
    assert len(one) == len(many)
    assert one.shuffled(epoch).tolist() == many.shuffled(epoch).tolist()
    assert sorted(one.shuffled(epoch)) == list(range(len(one)))
    assert all(torch.equal(one[index][0], many[index][0]) for index in range(len(one)))


def test_order_depends_on_seed_and_epoch():
    orders = [Windows(Tokens(200), 2, 1, seed).shuffled(epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert all(orders.count(order) == 1 for order in orders)
    assert orders[0] == Windows(Tokens(200), 2, 4, 0).shuffled(0).tolist()


def test_windows_cross_documents(tmp_path):
    with IndexedDatasetWriter(tmp_path / "tokens", np.uint16) as writer:
        for document in ([11, 12, 1], [], [13, 1], [14, 65499]):
            writer.add_document(document)
    windows = Windows(IndexedDataset(tmp_path / "tokens"), sequence_length=2, num_future_tokens=3, seed=0)
    assert [inputs.tolist() for inputs, _ in windows] == [[11, 12], [1, 13], [1, 14]]
    assert windows[1][1].tolist() == [[13, 1], [1, 14], [14, 65499]]
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            windows[outside]
    assert windows[2][1].tolist() == [[14, 65499], [65499, IGNORED], [IGNORED, IGNORED]]


@pytest.mark.parametrize("num_tokens", [0, 1, 8])
def test_corpus_too_short(num_tokens):
    with pytest.raises(InputError, match=rf"^tokens has {num_tokens} tokens; expected at least 9 .*sequence_length=8.*$"):
        Windows(Tokens(num_tokens), 8, 4, seed=0)


def test_shortest_corpus():
    windows = Windows(Tokens(9), 8, 1, seed=0)
    assert len(windows) == 1
    assert not windows.targets_can_be_ignored


@pytest.mark.parametrize("tokens", [[0, 1, 99, 0, 5, 100], [100, 0, 0, 0, 0, 0], [0, 0, 0, 0, -1, 0]])
def test_token_outside_the_vocabulary(monkeypatch, tokens):
    monkeypatch.setattr(windows_module, "SCANNED_TOKENS", 4)
    windows = Windows(Tokens(6, tokens), 2, 1, seed=0)
    wrong = min(tokens) if min(tokens) < 0 else 100
    with pytest.raises(InputError, match=rf"^tokens holds token {wrong}, model\.vocab_size is 100; expected .*$"):
        windows.check_vocabulary(100)
    if wrong == 100:
        assert windows.check_vocabulary(101) is None
