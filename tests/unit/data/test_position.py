"""The position in the data: no window is skipped or repeated if the batch, the ranks, the corpora or weights change."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamtp.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megamtp.data.loader import TrainLoader
from megamtp.data.position import DataPosition, find_changes, new_position, read_position, resumed_position
from megamtp.data.windows import Windows
from megamtp.errors import CheckpointError

T = 3
SIZES = (11, 5, 30)  # windows of corpora 0, 1, 2; token i of corpus c has the id 1000 c + i
CHECKPOINT = Path("run/checkpoints/step-0000004")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> list[IndexedDataset]:
    folder = tmp_path_factory.mktemp("position")
    opened = []
    for number, size in enumerate(SIZES):
        with IndexedDatasetWriter(folder / str(number), np.int32) as writer:
            writer.add_document(1000 * number + np.arange(size * T + 1))
        opened.append(IndexedDataset(folder / str(number)))
    return opened


def windows(dataset: IndexedDataset, sequence_length: int = T, seed: int = 0, documents: str = "continue") -> Windows:
    return Windows(dataset, sequence_length, 1, seed, documents=documents)


class Run:
    """Handles the position as pretraining does, without a model. Each call of `train` resumes the run.

    Attributes:
        seen: the first tokens of all windows, in the order of training.
    """

    def __init__(self, corpora: list[Windows], weights: list[float]):
        self.position, self.step = new_position(corpora, weights), 0
        self.seen: list[int] = []

    def train(self, corpora: list[Windows], num_steps: int, global_batch: int, world_size: int) -> None:
        blend = self.position.blend(corpora)
        loaders = [
            TrainLoader(blend, global_batch, 1, rank, world_size, self.step, self.position.windows)
            for rank in range(world_size)
        ]
        for step in range(self.step, self.step + num_steps):
            for batches in zip(*(loader.read(step) for loader in loaders), strict=True):
                self.seen += [int(batch.inputs[0, 0]) for batch in batches]
        self.step += num_steps
        position = self.position.advanced(blend, loaders[0].first_window(self.step))
        self.position = read_position(json.loads(json.dumps(position.to_json())), CHECKPOINT)


def consists_of_epochs(seen: list[int], size: int) -> bool:
    """Returns whether no window occurs twice in an epoch of `size` windows."""
    epochs = [seen[first : first + size] for first in range(0, len(seen), size)]
    return all(max(Counter(epoch).values()) == 1 for epoch in epochs)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([4, 8, 16]), st.sampled_from([1, 2, 4])), min_size=1, max_size=6
    )
)
def test_changing_the_batch_and_the_ranks_skips_and_repeats_no_window(datasets, jobs):
    corpora = [windows(dataset) for dataset in datasets]
    run = Run(corpora, [3, 1, 2])
    for num_steps, global_batch, world_size in jobs:
        assert find_changes(run.position, corpora, [3, 1, 2]) == []
        run.train(corpora, num_steps, global_batch, world_size)
    total = sum(num_steps * global_batch for num_steps, global_batch, _ in jobs)
    uninterrupted = new_position(corpora, [3, 1, 2]).blend(corpora).windows_at(np.arange(total))
    assert run.seen == [int(window.inputs[0]) for window in uninterrupted]
    for number, corpus in enumerate(run.position.corpora):
        own = [token for token in run.seen if token // 1000 == number]
        assert corpus.next_window == len(own) and corpus.trained_tokens == T * len(own)
        assert consists_of_epochs(own, SIZES[number])


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True),
            st.lists(st.integers(1, 5), min_size=3, max_size=3),
            st.sampled_from(["continue", "mask"]),
            st.integers(1, 3),
            st.sampled_from([4, 8]),
        ),
        min_size=2,
        max_size=5,
    )
)
def test_each_corpus_continues_after_changes_of_corpora_weights_and_documents(datasets, jobs):
    """A corpus that stays in the blend, or leaves and comes back, continues at its position."""
    run = None
    for numbers, weights, documents, num_steps, global_batch in jobs:
        corpora = [windows(datasets[number], documents=documents) for number in numbers]
        weights = weights[: len(numbers)]
        if run is None:
            run = Run(corpora, weights)
        elif find_changes(run.position, corpora, weights):
            run.position, lines = resumed_position(run.position, corpora, weights)
            assert len(lines) == len(corpora)
        run.train(corpora, num_steps, global_batch, 2)
        for number, size in enumerate(SIZES):
            own = [token for token in run.seen if token // 1000 == number]
            assert consists_of_epochs(own, size)


@pytest.mark.parametrize("change", [{}, {"sequence_length": 2}, {"seed": 1}])
def test_corpus_that_comes_back_continues_at_its_position(datasets, change):
    run = Run([windows(dataset) for dataset in datasets[:2]], [1, 1])
    run.train([windows(dataset) for dataset in datasets[:2]], 2, 8, 1)
    alone = [windows(datasets[0], **change)]
    run.position, _ = resumed_position(run.position, alone, [1])
    run.train(alone, 1, 4, 1)
    both = [windows(dataset, **change) for dataset in datasets[:2]]
    run.position, lines = resumed_position(run.position, both, [1, 1])
    epoch_windows = len(both[1])
    # The run has trained on 8 windows of epochs of 5. A new order begins with the third epoch.
    window = 2 * epoch_windows if change else 8
    expected = (
        f"continues at window {window % epoch_windows} of its epoch {window // epoch_windows + 1}, after {8 * T} tokens"
    )
    assert expected in lines[1] and run.position.left == []
    assert [corpus.stream for corpus in run.position.corpora] == [0, 1]


@pytest.mark.parametrize("change", [{"sequence_length": 2}, {"seed": 1}])
def test_new_windows_begin_with_a_new_epoch(datasets, change):
    before, after = [windows(datasets[2])], [windows(datasets[2], **change)]
    run = Run(before, [1])
    run.train(before, 2, 8, 1)
    run.position, (line,) = resumed_position(run.position, after, [1])
    assert "continues at window 0 of its epoch 2, after 48 tokens of training, in a new order" in line
    length = change.get("sequence_length", T)
    run.train(after, 2, 8, 2)
    assert run.position.corpora[0].trained_tokens == 16 * T + 16 * length
    assert len(set(run.seen[16:])) == 16
    run.position, (line,) = resumed_position(run.position, before, [1])
    assert "continues at window 0 of its epoch 3" in line
    run.train(before, 1, 16, 1)
    assert run.seen[-16:] != run.seen[:16] and len(set(run.seen[-16:])) == 16


def test_each_change_is_named(datasets, tmp_path):
    corpora = [windows(dataset) for dataset in datasets[:2]]
    saved = new_position(corpora, [1, 1])
    names = [dataset.name for dataset in datasets]

    def changes(changed: list[Windows], weights: list[float]) -> list[str]:
        return find_changes(saved, changed, weights)

    assert changes(corpora, [2, 2]) == []
    assert changes([windows(dataset, 2) for dataset in datasets[:2]], [1, 1]) == [
        "train.sequence_length was 3, is now 2"
    ]
    assert changes([windows(dataset, seed=7) for dataset in datasets[:2]], [1, 1]) == ["train.seed was 0, is now 7"]
    assert changes([windows(dataset, documents="mask") for dataset in datasets[:2]], [1, 1]) == [
        "data.documents was continue, is now mask"
    ]
    assert changes(corpora[:1], [1]) == [
        f"data.train: {names[1]} is missing or has other tokens",
        f"data.train: the share of {names[0]} was 0.50000, is now 1.00000",
    ]
    assert f"data.train: {names[2]} is new" in changes([*corpora, windows(datasets[2])], [1, 1, 1])
    assert changes(corpora[::-1], [1, 1]) == ["data.train: the corpora are in another order"]
    moved = tmp_path / "moved"
    for end in (".bin", ".idx", ".crc"):
        moved.with_suffix(end).write_bytes(Path(names[0] + end).read_bytes())
    assert changes([windows(IndexedDataset(moved)), corpora[1]], [1, 1]) == []
    with IndexedDatasetWriter(moved, np.int32) as writer:
        writer.add_document(np.arange(SIZES[0] * T + 1) + 5)
    assert changes([windows(IndexedDataset(moved)), corpora[1]], [1, 1])[0] == (
        f"data.train: {names[0]} is missing or has other tokens"
    )


def test_corpus_that_is_twice_in_the_blend_has_two_positions(datasets):
    corpora = [windows(datasets[0]), windows(datasets[0])]
    run = Run(corpora, [1, 3])
    run.train(corpora, 2, 8, 1)
    assert find_changes(run.position, corpora, [1, 3]) == []
    assert [corpus.next_window for corpus in run.position.corpora] == [4, 12]


def test_epochs_and_warnings(datasets):
    corpora = [windows(dataset) for dataset in datasets[:2]]
    position = new_position(corpora, [1, 1])
    blend = position.blend(corpora)
    assert position.advanced(blend, 8).warnings() == []
    at_end = position.advanced(blend, 50)
    assert at_end.describe_epochs() == [
        f"{datasets[0].name}: 0.50000 of the windows, 75 tokens of training from 34, 2.21 epochs",
        f"{datasets[1].name}: 0.50000 of the windows, 75 tokens of training from 16, 4.69 epochs",
    ]
    (warning,) = at_end.warnings()
    assert warning.startswith(f"megamtp: warning: {datasets[1].name} is repeated 4.69 times; expected at most 4 epochs")


def test_damaged_position_is_refused(datasets):
    saved = new_position([windows(datasets[0])], [1]).to_json()
    assert read_position(saved, CHECKPOINT) == DataPosition(**{**saved, "corpora": [*map(_corpus, saved["corpora"])]})
    for damaged in ({}, {**saved, "corpora": [{}]}, {**saved, "corpora": 3}, {**saved, "more": 1}):
        with pytest.raises(CheckpointError, match=r"step-0000004: its position in the data cannot be read"):
            read_position(damaged, CHECKPOINT)


def _corpus(saved: dict):
    from megamtp.data.position import CorpusPosition

    assert set(saved) == {field.name for field in dataclasses.fields(CorpusPosition)}
    return CorpusPosition(**saved)
