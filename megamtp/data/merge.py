"""Merges tokenised shards into train and validation files: drops duplicates and holds out validation documents."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megamtp.data.indexed_dataset import IndexedDatasetWriter, best_dtype
from megamtp.data.shards import Shard
from megamtp.data.tokenisation import TokenisationTask, too_few_documents
from megamtp.data.tokenised_shards import TokenisedShard, open_tokenised_shard

SPLITS = ("train", "validation")
CHUNK_TOKENS = 1 << 24
BUCKETS = 64


@dataclass
class Totals:
    """Statistics of the merged documents.

    Attributes:
        validation_counts: int64 [vocabulary], how often each token occurs in the validation split.
        num_bytes: the size of all texts in UTF-8 bytes.
        space_marks, end_markers: the numbers of documents whose columns space_mark and end_marker are set, see
            tokenised_shards.DOCUMENT.
        lengths: int64 [32]. Element i is the number of documents of 2**i to 2**(i+1) - 1 tokens, with end-of-document
            tokens.
    """

    validation_counts: np.ndarray
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    num_bytes: int = 0
    duplicates: int = 0
    space_marks: int = 0
    end_markers: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(32, dtype=np.int64))
    not_utf8: list[str] = field(default_factory=list)
    skipped_records: int = 0


class TokenisedShards:
    """All tokenised shards in order, opened one at a time."""

    def __init__(self, shards: list[Shard], task: TokenisationTask, vocab_size: int):
        self._shards, self._task, self.vocab_size = shards, task, vocab_size
        self.dtype = best_dtype(vocab_size)
        self._kept: list[np.ndarray] | None = None  # mask of each shard's documents; None: all documents

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[tuple[TokenisedShard, np.ndarray]]:
        """Yields (shard, bool [documents]: whether each document is kept)."""
        for index, shard in enumerate(self._shards):
            tokenised = open_tokenised_shard(shard, self._task, self.dtype)
            yield tokenised, np.ones(len(tokenised.documents), dtype=bool) if self._kept is None else self._kept[index]

    def drop_duplicates(self) -> None:
        """Keeps only the first of documents with the same text hash. Keeps 17 bytes per document in memory."""
        sizes = [len(shard.documents) for shard, _ in self]
        high, low = np.empty(sum(sizes), dtype=np.uint64), np.empty(sum(sizes), dtype=np.uint64)
        start = 0
        for shard, _ in self:
            stop = start + len(shard.documents)
            high[start:stop], low[start:stop] = shard.documents["text_high"], shard.documents["text_low"]
            start = stop
        self._kept = np.split(_is_first(high, low), np.cumsum(sizes)[:-1])

    def split_hashes(self) -> Iterator[np.ndarray]:
        """Yields the split hashes of the kept documents of each shard."""
        for shard, kept in self:
            yield shard.documents["name_hash"][kept]


def _is_first(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Returns whether each 128-bit number is the first occurrence of its value.

    Sorts bucket by bucket, because sorting all numbers at once would need more memory.
    """
    first = np.ones(len(high), dtype=bool)
    bucket_of = (high % BUCKETS).astype(np.uint8)
    for bucket in range(BUCKETS):
        indices = np.flatnonzero(bucket_of == bucket)
        indices = indices[np.lexsort((low[indices], high[indices]))]  # a stable sort: equal numbers stay in order
        same = (high[indices[1:]] == high[indices[:-1]]) & (low[indices[1:]] == low[indices[:-1]])
        first[indices[1:][same]] = False
    return first


def split_threshold(shards: TokenisedShards, validation_fraction: float, inputs: str) -> int:
    """Returns the split hash below which documents are held out: at least one document, and never all.

    Documents of the same name, from several inputs, have the same hash and stay together. Only a histogram of the
    hashes' upper 16 bits and one of its bins are in memory.

    Args:
        inputs: named in the error message.

    Raises:
        InputError: there are fewer than two different names.
    """
    counts, smallest, largest = np.zeros(1 << 16, dtype=np.int64), None, None
    for hashes in shards.split_hashes():
        if len(hashes):
            counts += np.bincount((hashes >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
            smallest = min(int(hashes.min()), smallest if smallest is not None else 1 << 64)
            largest = max(int(hashes.max()), largest or 0)
    if smallest == largest:
        raise too_few_documents(0 if smallest is None else 1, inputs)
    total = int(counts.sum())
    num_held_out = min(total - 1, max(1, round(validation_fraction * total)))
    bin_number = int(np.searchsorted(np.cumsum(counts), num_held_out))
    in_bin = np.sort(
        np.concatenate([hashes[hashes >> np.uint64(48) == bin_number] for hashes in shards.split_hashes()])
    )
    last = int(in_bin[num_held_out - int(counts[:bin_number].sum()) - 1])
    return last if last == largest else last + 1


def write_splits(shards: TokenisedShards, threshold: int, output: Path) -> Totals:
    """Writes train and validation .bin, .idx and .crc into `output`. Raises OSError."""
    totals = Totals(np.zeros(shards.vocab_size, dtype=np.int64))
    with ExitStack() as stack:
        writers = {split: stack.enter_context(IndexedDatasetWriter(output / split, shards.dtype)) for split in SPLITS}
        for shard, kept in tqdm(shards, unit=" shards", desc="merging", disable=None, dynamic_ncols=True):
            totals.not_utf8 += shard.not_utf8
            totals.skipped_records += len(shard.bad_records)
            totals.duplicates += int((~kept).sum())
            held_out = shard.documents["name_hash"] < np.uint64(threshold)
            for rows, tokens in _chunks(shard):
                for split, in_split in (("train", ~held_out), ("validation", held_out)):
                    _append(split, writers[split], shard.documents[rows], tokens, (in_split & kept)[rows], totals)
    return totals


def _chunks(shard: TokenisedShard) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows of documents, their tokens), with at most CHUNK_TOKENS tokens or a single document."""
    ends = np.cumsum(shard.documents["length"], dtype=np.int64)
    start = 0
    while start < len(ends):
        first_token = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, first_token + CHUNK_TOKENS, side="right")))
        yield slice(start, stop), shard.tokens[first_token : int(ends[stop - 1])]
        start = stop


def _append(
    split: str,
    writer: IndexedDatasetWriter,
    documents: np.ndarray,
    tokens: np.ndarray,
    selected: np.ndarray,
    totals: Totals,
) -> None:
    lengths = documents["length"]
    tokens = tokens if selected.all() else tokens[np.repeat(selected, lengths)]
    lengths = lengths[selected]
    writer.add_documents(tokens, lengths)
    totals.documents[split] += len(lengths)
    totals.tokens[split] += len(tokens)
    totals.num_bytes += int(documents["bytes"][selected].sum())
    totals.space_marks += int(documents["space_mark"][selected].sum())
    totals.end_markers += int(documents["end_marker"][selected].sum())
    totals.lengths += np.bincount(np.frexp(lengths)[1] - 1, minlength=len(totals.lengths))
    if split == "validation":
        totals.validation_counts += np.bincount(tokens, minlength=len(totals.validation_counts))
