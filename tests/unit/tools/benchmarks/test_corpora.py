"""Invented corpora have the documents that were asked for."""

import pytest
from benchmarks import corpora

from megamtp.data.indexed_dataset import IndexedDataset


@pytest.mark.parametrize(("write", "lengths"), [(corpora.write_even, [30] * 4), (corpora.write_sparse, [0, 0, 0, 120])])
def test_invented_corpora_are_whole(tmp_path, write, lengths):
    write(tmp_path / "invented", 120, 30 if write is corpora.write_even else 4)
    documents = list(IndexedDataset(tmp_path / "invented"))
    assert [len(document) for document in documents] == lengths
    assert not any(document.any() for document in documents)
