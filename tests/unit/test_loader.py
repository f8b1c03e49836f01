"""The loader: one stream of windows whatever the ranks, micro-batches and resumes; evaluation sees each window once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.data.loader import Batch, TrainLoader, evaluation_batches
from megamtp.data.windows import IGNORED, Windows
from megamtp.errors import InputError
from tests.unit.test_windows import Tokens

T, N = 3, 2
GLOBAL_BATCH = 8


def make_windows(number: int, seed: int = 0) -> Windows:
    """Windows that hold no target beyond the end, of tokens that tell their place."""
    return Windows(Tokens(number * T + N), T, N, seed)


def numbers(batch: Batch) -> list[int]:
    """Which windows a batch holds, after a look at all of their content."""
    assert batch.targets.shape == (N, *batch.inputs.shape)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    for head in range(N):
        assert torch.equal(batch.targets[head], batch.inputs + head + 1)
    return (batch.inputs[:, 0] // T).tolist()


def global_batch(windows: Windows, step: int, world_size: int, micro_batch_size: int) -> list[int]:
    """The windows of a step over all ranks, micro-batch by micro-batch and in each rank by rank."""
    loaders = [TrainLoader(windows, GLOBAL_BATCH, micro_batch_size, rank, world_size) for rank in range(world_size)]
    micro_batches = zip(*(loader.micro_batches(step) for loader in loaders), strict=True)
    return [number for across_ranks in micro_batches for batch in across_ranks for number in numbers(batch)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 5), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(0, 3))
def test_global_batch_is_a_slice_of_the_shuffled_epochs(number, step, world_size, micro_batch_size, seed):
    windows = make_windows(number, seed)
    epochs = range((step + 1) * GLOBAL_BATCH // number + 1)
    stream = np.concatenate([windows.shuffled(epoch) for epoch in epochs])
    expected = stream[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH].tolist()
    assert global_batch(windows, step, world_size, micro_batch_size) == expected


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_accumulation_makes_up_for_small_micro_batches(micro_batch_size):
    loader = TrainLoader(make_windows(10), GLOBAL_BATCH, micro_batch_size, 0, 1)
    batches = loader.micro_batches(0)
    assert loader.accumulation == len(batches) == 8 // micro_batch_size
    assert all(batch.inputs.shape == (micro_batch_size, T) for batch in batches)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resumed_stream_is_the_uninterrupted_one(world_size):
    windows, last = make_windows(13), world_size - 1
    from_start = TrainLoader(windows, GLOBAL_BATCH, 2, last, world_size)
    steps = [from_start.micro_batches(step) for step in range(7)]
    for start in range(7):
        resumed = TrainLoader(windows, GLOBAL_BATCH, 2, last, world_size)
        for step in range(start, 7):
            for batch, expected in zip(resumed.micro_batches(step), steps[step], strict=True):
                assert torch.equal(batch.inputs, expected.inputs)
                assert torch.equal(batch.targets, expected.targets)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_epoch_has_each_window_once_in_a_new_order(world_size):
    windows = make_windows(28)  # 7 steps are 2 epochs, the border amid a step
    stream = [number for step in range(7) for number in global_batch(windows, step, world_size, 2)]
    first, second = stream[:28], stream[28:]
    assert sorted(first) == sorted(second) == list(range(28))
    assert first != second
    assert first != list(range(28))


def test_batch_larger_than_the_corpus():
    stream = [number for step in range(3) for number in global_batch(make_windows(3), step, 2, 2)]
    assert [stream.count(number) for number in range(3)] == [8, 8, 8]


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(3, 1), (1, 3), (4, 4), (16, 1)])
def test_global_batch_that_cannot_be_divided(micro_batch_size, world_size):
    words = rf"^a global batch of 8 windows is not a multiple of {micro_batch_size} windows x {world_size} ranks; change .*$"
    with pytest.raises(InputError, match=words):
        TrainLoader(make_windows(10), GLOBAL_BATCH, micro_batch_size, 0, world_size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]), st.one_of(st.none(), st.integers(1, 25)))
def test_evaluation_has_each_window_once_and_equally_many_batches_a_rank(number, micro_batch_size, world_size, max_windows):
    windows = Windows(Tokens(number * T + 1), T, N, seed=0)  # the last window lacks a target of head 2
    ranks = [list(evaluation_batches(windows, micro_batch_size, rank, world_size, max_windows)) for rank in range(world_size)]
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
            assert torch.equal(inputs, windows[index][0])
            assert torch.equal(targets, windows[index][1])
    assert sorted(seen) == list(range(min(number, max_windows or number)))
