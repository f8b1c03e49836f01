"""The loader: the same windows for all ranks, micro-batches and resumes; evaluation reads each window once."""

import queue
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megamtp.data.loader import Batch, TrainLoader, evaluation_batches, read_group
from megamtp.data.windows import Window, Windows
from megamtp.errors import InputError
from megamtp.targets import IGNORED
from tests.unit.data.test_windows import Tokens, order

T, N = 3, 2
GLOBAL_BATCH = 8


def make_windows(num_windows: int, seed: int = 0) -> Windows:
    """Returns windows without targets beyond the end. Token i has the id i."""
    return Windows(Tokens(num_windows * T + N), T, N, seed)


def window_numbers(batch: Batch) -> list[int]:
    """Checks all inputs and targets of a batch, and returns the positions of its windows in the corpus."""
    assert batch.targets.shape == (N, *batch.inputs.shape)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    for head in range(N):
        assert torch.equal(batch.targets[head], batch.inputs + head + 1)
    return (batch.inputs[:, 0] // T).tolist()


def global_batch(windows: Windows, step: int, world_size: int, micro_batch_size: int) -> list[int]:
    """Returns the windows of a step, ordered by micro-batch and then by rank."""
    loaders = [TrainLoader(windows, GLOBAL_BATCH, micro_batch_size, rank, world_size) for rank in range(world_size)]
    micro_batches = zip(*(loader.read(step) for loader in loaders), strict=True)
    return [number for across_ranks in micro_batches for batch in across_ranks for number in window_numbers(batch)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 5), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(0, 3))
def test_global_batch_is_a_slice_of_the_shuffled_epochs(num_windows, step, world_size, micro_batch_size, seed):
    windows = make_windows(num_windows, seed)
    epochs = range((step + 1) * GLOBAL_BATCH // num_windows + 1)
    stream = np.concatenate([order(windows, epoch) for epoch in epochs])
    expected = stream[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH].tolist()
    assert global_batch(windows, step, world_size, micro_batch_size) == expected


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_number_of_micro_batches(micro_batch_size):
    loader = TrainLoader(make_windows(10), GLOBAL_BATCH, micro_batch_size, 0, 1)
    batches = loader.read(0)
    assert loader.num_micro_batches == len(batches) == 8 // micro_batch_size
    assert all(batch.inputs.shape == (micro_batch_size, T) for batch in batches)


@st.composite
def corpora(draw) -> tuple[list[int], int, int]:
    """Draws (document lengths, T, n) with at least one window, and with documents of 0 and 1 tokens."""
    lengths = [0, 1, *draw(st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(2, 30)), max_size=12))]
    length = draw(st.integers(1, 6))
    lengths.append(draw(st.integers(length + 1, 40)))
    return draw(st.permutations(lengths)), length, draw(st.integers(1, 4))


@settings(max_examples=25, deadline=None)
@given(corpora(), st.integers(0, 2**32), st.sampled_from(["continue", "mask", "isolate"]), st.data())
def test_each_token_is_a_target_once_per_epoch_for_any_ranks_and_resumes(tmp_path_factory, corpus, seed, mode, data):
    """Compares all tokens of two epochs, read by 1, 2, 4 and 8 ranks that resume at a random step."""
    lengths, length, n = corpus
    prefix = tmp_path_factory.getbasetemp() / "loader"
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for first, size in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            writer.add_document(np.arange(first, first + size))
    windows = Windows(IndexedDataset(prefix), length, n, seed, documents=mode)
    starts = {int(first) for first, size in zip(np.cumsum([0, *lengths]), lengths, strict=False) if size}
    expected = [token for token in range(1, len(windows) * length + 1) if mode == "continue" or token not in starts]
    steps = -(-2 * len(windows) // GLOBAL_BATCH)
    resume = data.draw(st.integers(0, steps))
    by_ranks = []
    for world_size in (1, 2, 4, 8):
        before = [TrainLoader(windows, GLOBAL_BATCH, 1, rank, world_size) for rank in range(world_size)]
        after = [TrainLoader(windows, GLOBAL_BATCH, 1, rank, world_size) for rank in range(world_size)]
        rows = []
        for step in range(steps):
            shares = [loader.read(step) for loader in (before if step < resume else after)]
            rows += [batch for across_ranks in zip(*shares, strict=True) for batch in across_ranks]
        by_ranks.append(rows)
    for rows in by_ranks[1:]:
        assert all(torch.equal(row.inputs, first.inputs) for row, first in zip(rows, by_ranks[0], strict=True))
        assert all(torch.equal(row.targets, first.targets) for row, first in zip(rows, by_ranks[0], strict=True))
    for epoch in range(2):
        rows = by_ranks[0][epoch * len(windows) : (epoch + 1) * len(windows)]
        targets = torch.cat([row.targets[0].flatten() for row in rows])
        assert sorted(targets[targets != IGNORED].tolist()) == expected


def test_each_step_is_read_once_and_in_the_thread():
    """The steps that are requested are consecutive but for one jump."""
    windows, reads = make_windows(30), []
    loader = TrainLoader(windows, GLOBAL_BATCH, 2, 0, 1)
    read = loader.read

    def recorded_read(step: int) -> list[Batch]:
        reads.append((step, threading.current_thread() is threading.main_thread()))
        return read(step)

    loader.read = recorded_read
    for step in (0, 1, 2, 50, 51):
        for batch, expected in zip(loader.micro_batches(step), read(step), strict=True):
            assert torch.equal(batch.inputs, expected.inputs)
    loader.close()
    steps = [step for step, _ in reads]
    assert set(steps) >= {0, 1, 2, 50, 51} and len(set(steps)) == len(steps)
    assert not any(in_main_thread for _, in_main_thread in reads)
    assert not any(thread.name.startswith("megamtp data") for thread in threading.enumerate())
    loader.close()


def test_two_steps_are_read_ahead():
    """After the request for step 0, steps 1 and 2 are read without another request."""
    loader, read_steps = TrainLoader(make_windows(30), GLOBAL_BATCH, 2, 0, 1), queue.Queue()
    read = loader.read

    def recorded_read(step: int) -> list[Batch]:
        read_steps.put(step)
        return read(step)

    loader.read = recorded_read
    loader.micro_batches(0)
    assert [read_steps.get(timeout=60) for _ in range(3)] == [0, 1, 2]
    loader.micro_batches(1)
    assert read_steps.get(timeout=60) == 3
    loader.close()


def test_resuming_at_step_ten_million_takes_no_time():
    loader = TrainLoader(Windows(Tokens(10**6), 3, 2, 0), GLOBAL_BATCH, 2, 0, 1)
    start = time.process_time()
    (batch, *_) = loader.micro_batches(10_000_000)
    assert time.process_time() - start < 0.2
    assert batch.inputs.shape == (2, 3)
    loader.close()


def test_damage_is_reported_at_its_step(tmp_path):
    """The thread reads the damaged step ahead, but the steps before it can still be trained."""
    with IndexedDatasetWriter(tmp_path / "damaged", np.uint16) as writer:
        writer.add_document([5] * 100)
        writer.add_document([5] * 37 + [400] + [5] * 100)
    windows = Windows(IndexedDataset(tmp_path / "damaged"), T, N, seed=0, vocab_size=300)
    wrong = next(
        step for step in range(10) if any(index in order(windows, 0)[step * 8 : step * 8 + 8] for index in (45, 44))
    )
    loader = TrainLoader(windows, GLOBAL_BATCH, 2, 0, 1)
    for step in range(wrong):
        assert loader.read_error(step) is None
        assert len(loader.micro_batches(step)) == 4
    assert "holds token 400" in loader.read_error(wrong)
    with pytest.raises(InputError, match=rf"^{tmp_path}/damaged\.bin holds token 400 in document 1, .*; expected ids"):
        loader.micro_batches(wrong)
    loader.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resumed_loader_reads_the_same_windows(world_size):
    windows, last = make_windows(13), world_size - 1
    from_start = TrainLoader(windows, GLOBAL_BATCH, 2, last, world_size)
    steps = [from_start.read(step) for step in range(7)]
    for start in range(7):
        resumed = TrainLoader(windows, GLOBAL_BATCH, 2, last, world_size)
        for step in range(start, 7):
            for batch, expected in zip(resumed.read(step), steps[step], strict=True):
                assert torch.equal(batch.inputs, expected.inputs)
                assert torch.equal(batch.targets, expected.targets)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_epoch_has_each_window_once_in_a_new_order(world_size):
    windows = make_windows(28)  # 7 steps are 2 epochs; the second epoch begins inside a step
    stream = [number for step in range(7) for number in global_batch(windows, step, world_size, 2)]
    first, second = stream[:28], stream[28:]
    assert sorted(first) == sorted(second) == list(range(28))
    assert first != second
    assert first != list(range(28))


def test_global_batch_larger_than_the_corpus():
    stream = [number for step in range(3) for number in global_batch(make_windows(3), step, 2, 2)]
    assert [stream.count(number) for number in range(3)] == [8, 8, 8]


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(3, 1), (1, 3), (4, 4), (16, 1)])
def test_global_batch_that_is_not_divisible_is_refused(micro_batch_size, world_size):
    message = (
        rf"^a global batch of 8 windows is not a multiple of {micro_batch_size} windows x {world_size} ranks; "
        rf"change .*$"
    )
    with pytest.raises(InputError, match=message):
        TrainLoader(make_windows(10), GLOBAL_BATCH, micro_batch_size, 0, world_size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]), st.one_of(st.none(), st.integers(1, 25)))
def test_evaluation_reads_each_window_once_in_equally_many_batches_per_rank(
    num_windows, micro_batch_size, world_size, max_windows
):
    windows = Windows(Tokens(num_windows * T + 1), T, N, seed=0)  # the last window lacks a target of head 2
    ranks = [
        list(evaluation_batches(windows, micro_batch_size, rank, world_size, max_windows)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.inputs.shape == (micro_batch_size, T)
        for row, inputs in enumerate(batch.inputs):
            targets = batch.targets[:, row]
            if (targets == IGNORED).all():
                continue
            index = int(inputs[0]) // T
            seen.append(index)
            assert torch.equal(inputs, windows[index].inputs)
            assert torch.equal(targets, windows[index].targets)
    assert sorted(seen) == list(range(min(num_windows, max_windows or num_windows)))


def test_a_group_of_evaluation_batches_ends_at_a_damaged_window():
    class Damaged(Windows):
        def __getitem__(self, index: int) -> Window:
            if index == 6:
                raise InputError("window 6")
            return super().__getitem__(index)

    windows = Damaged(Tokens(10 * T + N), T, N, seed=0)
    for rank, expected in enumerate([[(2, None), (1, None), (0, None)], [(1, "window 6"), (0, None)]]):
        batches = evaluation_batches(windows, 2, rank, 2, 10)
        groups = []
        while not groups or groups[-1][0]:
            group, error = read_group(batches, 2)
            groups.append((len(group), error))
        assert groups == expected
