"""The choice of held-out documents and of duplicates equals that of simple sorting and sets."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megamtp.data import merge, shards
from megamtp.data.corpus import prepare
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.input_files import find_source
from megamtp.errors import InputError

# Includes equal hashes, hashes with the same upper 16 bits, and the smallest and the largest hashes.
HASHES = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(2**60, 2**60 + 5), st.sampled_from([0, 1, 2**48, 2**64 - 1, 2**64 - 2])
)


class Hashes:
    """A fake TokenisedShards with these split hashes."""

    def __init__(self, hashes: list[int], num_shards: int):
        self.shards = np.array_split(np.array(hashes, dtype=np.uint64), num_shards)

    def split_hashes(self) -> Iterator[np.ndarray]:
        return iter(self.shards)


@given(st.lists(HASHES, min_size=2, max_size=40, unique=True), st.floats(0.001, 0.999), st.integers(1, 4))
@example([0, 2**64 - 1], 0.999, 1)
@example([2**64 - 2, 2**64 - 1], 0.001, 2)
def test_smallest_hashes_are_held_out(hashes, fraction, num_shards):
    threshold = merge.split_threshold(Hashes(hashes, num_shards), fraction, "")
    num_held_out = min(len(hashes) - 1, max(1, round(fraction * len(hashes))))
    assert sorted(value for value in hashes if value < threshold) == sorted(hashes)[:num_held_out]


@given(st.lists(HASHES, max_size=40), st.floats(0.001, 0.999), st.integers(1, 4))
def test_equal_names_stay_together_and_neither_split_is_empty(hashes, fraction, num_shards):
    if len(set(hashes)) < 2:
        with pytest.raises(InputError, match=f"found {len(set(hashes))} documents with different names in here;"):
            merge.split_threshold(Hashes(hashes, num_shards), fraction, "here")
        return
    threshold = merge.split_threshold(Hashes(hashes, num_shards), fraction, "")
    assert 0 < sum(value < threshold for value in hashes) < len(hashes)


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 3)), max_size=60))
def test_first_of_equal_numbers(pairs):
    high, low = np.array(pairs, dtype=np.uint64).reshape(-1, 2).T
    assert merge._is_first(high, low).tolist() == [pair not in pairs[:index] for index, pair in enumerate(pairs)]


def texts_of(folder: Path) -> list[str]:
    """Returns the documents of both splits."""
    return [bytes(tokens[:-1].tolist()).decode() for split in merge.SPLITS for tokens in IndexedDataset(folder / split)]


@pytest.mark.parametrize("number", [12, 60])
def test_duplicates_are_dropped_and_counted(tmp_path, monkeypatch, number):
    """Few documents are cut into pieces; the duplicates among many documents are in different shards."""
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 30)
    (tmp_path / "texts").mkdir()
    expected = []
    for index in range(number):
        text = f"text {index % 5} " * (index % 2 + 1)
        (tmp_path / f"texts/{index:02}.txt").write_text(text)
        expected += [text] if text not in expected else []
    source = find_source([tmp_path / "texts"])
    corpus, _ = prepare(source, tmp_path / "out", tokenizer="bytes", deduplicate=True, workers=2)
    assert sorted(texts_of(tmp_path / "out")) == sorted(expected)
    assert corpus.duplicates == number - len(expected) > 0
    assert sum(corpus.documents.values()) == len(expected)
    assert sum(corpus.tokens.values()) == sum(len(text) + 1 for text in expected)
    assert corpus.bytes_per_token == sum(map(len, expected)) / sum(corpus.tokens.values())
    kept, _ = prepare(source, tmp_path / "all", tokenizer="bytes")
    assert (kept.duplicates, sum(kept.documents.values())) == (0, number)


def test_equal_pieces_of_different_documents_are_kept(tmp_path):
    for name, end in (("a.txt", "one"), ("b.txt", "two"), ("c.txt", "one")):
        (tmp_path / name).write_text("line\n" * 10_000 + end)
    corpus, _ = prepare(find_source([tmp_path]), tmp_path / "out", tokenizer="bytes", deduplicate=True)
    assert (corpus.duplicates, sum(corpus.tokens.values())) == (1, 2 * (50_003 + 4))


def test_files_with_the_same_name_are_distinguished(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("line\n" * (10_000 if folder < "c" else 9_000))
    inputs = [tmp_path / folder for folder in ("a", "b", "c", "c")]
    corpus, _ = prepare(find_source(inputs), tmp_path / "out", tokenizer="bytes", deduplicate=True)
    assert (corpus.duplicates, sum(corpus.tokens.values())) == (2, 95_000 + sum(corpus.documents.values()))


def test_document_lengths_in_the_summary(tmp_path):
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text("x" * (number + 1))
    corpus, _ = prepare(find_source([tmp_path]), tmp_path / "out", tokenizer="bytes")
    assert corpus.document_lengths == {"2": 2, "4": 4, "8": 8, "16": 16, "32": 20}


@pytest.mark.parametrize("chunk_tokens", [1, 100, 1 << 24])
def test_corpus_does_not_depend_on_chunks(tmp_path, monkeypatch, chunk_tokens):
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} " * number + "!")
    monkeypatch.setattr(merge, "CHUNK_TOKENS", chunk_tokens)
    corpus, _ = prepare(find_source([tmp_path]), tmp_path / "out", tokenizer="bytes", validation_fraction=0.3)
    assert sorted(texts_of(tmp_path / "out")) == sorted(f"{number} " * number + "!" for number in range(50))
    assert corpus.documents == {"train": 35, "validation": 15}
