"""Windows: each token is a target exactly once for any n, and targets are IGNORED exactly where they should be."""

import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from benchmarks.corpora import write_sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megamtp.data.windows import Windows
from megamtp.errors import InputError
from megamtp.targets import IGNORED


class Tokens:
    """A fake IndexedDataset. By default, token i has the id i."""

    name, dtype = "tokens", np.dtype(np.int64)

    def __init__(self, num_tokens: int, tokens: list[int] | None = None):
        self.num_tokens, self._tokens = num_tokens, np.array(range(num_tokens) if tokens is None else tokens)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop]

    def crc32_of_ends(self) -> int:
        return zlib.crc32(self._tokens.tobytes())


def order(windows: Windows, epoch: int) -> list[int]:
    return windows.epoch_order(epoch)(np.arange(len(windows))).tolist()


@st.composite
def shapes(draw) -> tuple[int, int, int]:
    """(tokens, T, n) with at least one window."""
    length = draw(st.integers(1, 12))
    return draw(st.integers(length + 1, 60)), length, draw(st.integers(1, 8))


@settings(max_examples=100, deadline=None)
@given(shapes())
def test_each_token_is_a_target_of_head_1_exactly_once(shape):
    num_tokens, length, n = shape
    windows = Windows(Tokens(num_tokens), length, n, seed=0)
    targets = torch.cat([windows[index].targets[0] for index in order(windows, 0)]).sort().values
    assert targets.tolist() == list(range(1, len(windows) * length + 1))
    remainder = num_tokens - 1 - len(targets)
    assert 0 <= remainder < length


@settings(max_examples=100, deadline=None)
@given(shapes())
def test_targets_follow_their_inputs_and_are_ignored_only_beyond_the_end(shape):
    num_tokens, length, n = shape
    windows = Windows(Tokens(num_tokens), length, n, seed=0)
    ignored = False
    for index in range(len(windows)):
        inputs, targets, _, following = windows[index]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == list(range(index * length, (index + 1) * length))
        expected = inputs + torch.arange(1, n + 1)[:, None]
        assert torch.equal(targets, torch.where(expected < num_tokens, expected, IGNORED))
        assert following.tolist() == targets[: n - 1, -1].tolist()
        ignored |= bool((targets == IGNORED).any())
    assert windows.targets_can_be_ignored == ignored


@settings(max_examples=50, deadline=None)
@given(shapes(), st.integers(0, 3), st.integers(0, 3))
def test_number_and_order_do_not_depend_on_n(shape, seed, epoch):
    num_tokens, length, n = shape
    single, multi = (Windows(Tokens(num_tokens), length, num_heads, seed) for num_heads in (1, n))
    assert len(single) == len(multi)
    assert order(single, epoch) == order(multi, epoch)
    assert sorted(order(single, epoch)) == list(range(len(single)))
    assert all(torch.equal(single[index][0], multi[index][0]) for index in range(len(single)))


def test_order_depends_on_seed_and_epoch():
    keys = [(seed, stream, epoch) for seed in range(3) for stream in range(2) for epoch in range(3)]
    orders = [order(Windows(Tokens(200), 2, 1, seed, stream), epoch) for seed, stream, epoch in keys]
    assert all(orders.count(each) == 1 for each in orders)
    assert orders[0] == order(Windows(Tokens(200), 2, 4, 0), 0)


def test_windows_at_indices_of_several_epochs():
    windows = Windows(Tokens(12), 2, 1, seed=3)
    indices = np.array([0, 4, 5, 11, 14, 7])
    expected = [order(windows, index // 5)[index % 5] for index in indices.tolist()]
    assert [int(window.inputs[0]) // 2 for window in windows.windows_at(indices)] == expected


def test_windows_cross_documents(tmp_path):
    with IndexedDatasetWriter(tmp_path / "tokens", np.uint16) as writer:
        for document in ([11, 12, 1], [], [13, 1], [14, 65499]):
            writer.add_document(document)
    windows = Windows(IndexedDataset(tmp_path / "tokens"), sequence_length=2, num_future_tokens=3, seed=0)
    assert [window.inputs.tolist() for window in windows] == [[11, 12], [1, 13], [1, 14]]
    assert windows[1][1].tolist() == [[13, 1], [1, 14], [14, 65499]]
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            windows[outside]
    assert windows[2][1].tolist() == [[14, 65499], [65499, IGNORED], [IGNORED, IGNORED]]


@pytest.mark.parametrize("num_tokens", [0, 1, 8])
def test_corpus_that_is_too_short_is_refused(num_tokens):
    with pytest.raises(
        InputError, match=rf"^tokens has {num_tokens} tokens; expected at least 9 .*sequence_length=8.*$"
    ):
        Windows(Tokens(num_tokens), 8, 4, seed=0)


def test_shortest_corpus():
    windows = Windows(Tokens(9), 8, 1, seed=0)
    assert len(windows) == 1
    assert not windows.targets_can_be_ignored


def write(prefix, documents: list[list[int]], dtype: type = np.int32) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), length=st.integers(1, 8), n=st.integers(1, 5))
def test_targets_in_another_document_are_masked(tmp_path_factory, lengths, length, n):
    owners = [number for number, size in enumerate(lengths) for _ in range(size)]
    if len(owners) <= length:
        return
    dataset = write(tmp_path_factory.getbasetemp() / "masked", [[number] * size for number, size in enumerate(lengths)])
    crossing, masked, isolated = (
        Windows(dataset, length, n, 0, documents=mode) for mode in ("continue", "mask", "isolate")
    )
    assert masked.targets_can_be_ignored and isolated.targets_can_be_ignored
    for index in range(len(crossing)):
        inputs, targets, documents, following = masked[index]
        assert torch.equal(following, crossing[index].following)  # also of another document
        assert documents is None and crossing[index].documents is None
        for head in range(n):
            for position, owner in enumerate(owners[index * length : (index + 1) * length]):
                target = index * length + position + head + 1
                expected = owner if target < len(owners) and owners[target] == owner else IGNORED
                assert targets[head, position] == expected
        assert torch.equal(inputs, crossing[index].inputs)
        assert torch.equal(targets, isolated[index].targets)
        changes = (inputs[1:] != inputs[:-1]).long().cumsum(0)  # each token is the number of its document
        assert isolated[index].documents.tolist() == [0, *changes.tolist()]


@pytest.mark.parametrize(
    ("tokens", "document"), [([[0, 1], [], [99, 0, 5], [100, 1]], 3), ([[100, 0, 0]], 0), ([[0], [-1, 0]], 1)]
)
def test_token_outside_the_vocabulary_is_refused(tmp_path, tokens, document):
    windows = Windows(write(tmp_path / "wrong", tokens), 2, 1, seed=0, vocab_size=100)
    wrong = next(token for part in tokens for token in part if not 0 <= token < 100)
    message = (
        rf"^{tmp_path}/wrong\.bin holds token {wrong} in document {document}, but model\.vocab_size is 100; "
        rf"expected ids from 0 to 99: prepare .*$"
    )
    with pytest.raises(InputError, match=message):
        windows.check_ends()
    with pytest.raises(InputError, match=message):
        list(windows)
    with pytest.raises(InputError, match=message):
        windows.check_first(None, 0, 1)
    if wrong == 100:
        Windows(windows.dataset, 2, 1, seed=0, vocab_size=101).check_ends()


def test_exactly_the_tokens_of_the_evaluation_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("megamtp.data.windows.CHECKED_TOKENS", 4)
    windows = Windows(write(tmp_path / "late", [[5] * 19, [100] + [5] * 20]), 4, 3, seed=0, vocab_size=100)
    windows.check_ends()
    windows.check_first(4, 0, 1)  # tokens 0 to 18
    for max_windows in (5, 99, None):
        with pytest.raises(InputError, match="holds token 100 in document 1"):
            windows.check_first(max_windows, 0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_divide_the_check_of_tokens(tmp_path, monkeypatch, world_size):
    monkeypatch.setattr("megamtp.data.windows.CHECKED_TOKENS", 4)
    windows = Windows(write(tmp_path / "all", [[5] * 43]), 4, 3, seed=0)
    read, read_tokens = [], windows._read
    monkeypatch.setattr(
        windows, "_read", lambda start, stop: read.extend(range(start, stop)) or read_tokens(start, stop)
    )
    shares = []
    for rank in range(world_size):
        windows.check_first(9, rank, world_size)
        shares.append(len(read) - sum(shares))
    assert sorted(read) == list(range(39)) and max(shares) <= -(-10 // world_size) * 4


def test_floating_point_numbers_are_refused(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}/floats holds float32; expected token ids"):
        Windows(write(tmp_path / "floats", [[1, 2, 3]], np.float32), 2, 1, seed=0)


BILLION, TRILLION = 10**9, 10**12
OPEN_AND_READ = """
import sys, time
import numpy as np, torch
from megamtp.data.blend import Blend
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.loader import TrainLoader
from megamtp.data.windows import Windows

def anonymous_mebibytes():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

imported, start = anonymous_mebibytes(), time.process_time()
dataset = IndexedDataset(sys.argv[1])
windows = Windows(dataset, 4096, 4, seed=0, vocab_size=32000, documents="isolate")
windows.check_ends()
loader = TrainLoader(Blend([windows], [1.0]), 1024, 4, 0, 64)
opened = time.process_time() - start
batches = loader.read(10_000_000)
print(len(dataset), dataset.num_tokens, opened, time.process_time() - start - opened, anonymous_mebibytes() - imported,
      anonymous_mebibytes(), batches[0].inputs.shape[1])
"""


def test_opening_a_trillion_tokens_takes_less_than_a_second(tmp_path):
    write_sparse(tmp_path / "sparse", TRILLION, BILLION, block_bytes=2**20)
    command = [sys.executable, "-c", OPEN_AND_READ, str(tmp_path / "sparse")]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    documents, tokens, opened, read, more_mebibytes, mebibytes, length = map(float, finished.stdout.split())
    assert (documents, tokens, length) == (BILLION, TRILLION, 4096)
    # These are seconds of CPU time, which does not depend on other processes. The files are sparse.
    assert opened < 1 and read < 1
    assert more_mebibytes < 40 and mebibytes < 200
    assert (tmp_path / "sparse.idx").stat().st_blocks * 512 < 2**20


def test_document_boundaries_are_checked_unless_they_are_ignored():
    class Damaged(Tokens):
        def boundaries(self, start: int, stop: int) -> np.ndarray:
            raise InputError("the index is inconsistent")

    Windows(Damaged(40), 4, 1, 0).check_first(None, 0, 1)
    with pytest.raises(InputError, match="the index is inconsistent"):
        Windows(Damaged(40), 4, 1, 0, documents="mask").check_first(None, 0, 1)
