"""Synthetic corpora have the requested documents."""

import pytest
from benchmarks import corpora

from megamtp.data.indexed_dataset import IndexedDataset


@pytest.mark.parametrize(("write", "lengths"), [(corpora.write_even, [30] * 4), (corpora.write_sparse, [0, 0, 0, 120])])
def test_synthetic_corpora_can_be_read(tmp_path, write, lengths):
    write(tmp_path / "synthetic", 120, 30 if write is corpora.write_even else 4)
    documents = list(IndexedDataset(tmp_path / "synthetic"))
    assert [len(document) for document in documents] == lengths
    assert not any(document.any() for document in documents)
