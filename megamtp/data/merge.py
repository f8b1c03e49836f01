"""Finished parts -> train and validation files: which documents are duplicates, which are held out, and everything
in order.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megamtp.data.indexed_dataset import IndexedDatasetWriter, best_dtype
from megamtp.data.jobs import TokenisationJob, too_few
from megamtp.data.parts import Part, open_part
from megamtp.data.shards import Shard

SPLITS = ("train", "validation")
CHUNK_TOKENS = 1 << 24
BUCKETS = 64


@dataclass
class Totals:
    """What was merged.

    Attributes:
        lengths: int64 [32], documents of 2**i to 2**(i+1) - 1 tokens, their ends included.
        space_marks, end_markers: documents that hold such, as in parts.DOCUMENT.
        validation_counts: int64 [vocabulary], how often each token is in the validation split.
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


class Parts:
    """The finished parts of all shards in order, opened one at a time, without their duplicates once those are
    found.
    """

    def __init__(self, shards: list[Shard], job: TokenisationJob, vocab_size: int):
        self._shards, self._job, self.vocab_size = shards, job, vocab_size
        self.dtype = best_dtype(vocab_size)
        self._kept: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[tuple[Part, np.ndarray]]:
        """(part, which of its documents are kept [documents])."""
        for index, shard in enumerate(self._shards):
            part = open_part(shard, self._job, self.dtype)
            yield part, np.ones(len(part.documents), dtype=bool) if self._kept is None else self._kept[index]

    def drop_duplicates(self) -> None:
        """Keeps the first of the documents whose texts have the same hash. Needs 17 bytes a document and some more
        for a while.
        """
        sizes = [len(part.documents) for part, _ in self]
        high, low = np.empty(sum(sizes), dtype=np.uint64), np.empty(sum(sizes), dtype=np.uint64)
        start = 0
        for part, _ in self:
            stop = start + len(part.documents)
            high[start:stop], low[start:stop] = part.documents["text_high"], part.documents["text_low"]
            start = stop
        self._kept = np.split(_is_first(high, low), np.cumsum(sizes)[:-1])

    def names(self) -> Iterator[np.ndarray]:
        """The split hashes of kept documents, part by part."""
        for part, kept in self:
            yield part.documents["name"][kept]


def _is_first(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Which of 128-bit numbers have no equal before them; in buckets, since a sort of all would need more memory."""
    first = np.ones(len(high), dtype=bool)
    bucket_of = (high % BUCKETS).astype(np.uint8)
    for bucket in range(BUCKETS):
        places = np.flatnonzero(bucket_of == bucket)
        places = places[np.lexsort((low[places], high[places]))]  # stable: equals stay in order
        same = (high[places[1:]] == high[places[:-1]]) & (low[places[1:]] == low[places[:-1]])
        first[places[1:][same]] = False
    return first


def split_limit(parts: Parts, validation_fraction: float, place: str) -> int:
    """Documents whose split hash is below this are held out: at least one, and never all. Memory: a 65536th of the
    hashes.

    Documents of one name, from several inputs, stay together.

    Raises:
        InputError: there are fewer than two names. `place` says where in the message.
    """
    counts, smallest, largest = np.zeros(1 << 16, dtype=np.int64), None, None
    for names in parts.names():
        if len(names):
            counts += np.bincount((names >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
            smallest = min(int(names.min()), smallest if smallest is not None else 1 << 64)
            largest = max(int(names.max()), largest or 0)
    if smallest == largest:
        raise too_few(0 if smallest is None else 1, place)
    total = int(counts.sum())
    wanted = min(total - 1, max(1, round(validation_fraction * total)))
    bin_number = int(np.searchsorted(np.cumsum(counts), wanted))
    in_bin = np.sort(np.concatenate([names[names >> np.uint64(48) == bin_number] for names in parts.names()]))
    last = int(in_bin[wanted - int(counts[:bin_number].sum()) - 1])
    return last if last == largest else last + 1


def write_splits(parts: Parts, limit: int, output: Path) -> Totals:
    """Writes train and validation .bin, .idx and .crc into `output`. Raises OSError."""
    totals = Totals(np.zeros(parts.vocab_size, dtype=np.int64))
    with ExitStack() as stack:
        writers = {split: stack.enter_context(IndexedDatasetWriter(output / split, parts.dtype)) for split in SPLITS}
        for part, kept in tqdm(parts, unit=" parts", desc="merging", disable=None, dynamic_ncols=True):
            totals.not_utf8 += part.not_utf8
            totals.skipped_records += len(part.bad_records)
            totals.duplicates += int((~kept).sum())
            held_out = part.documents["name"] < np.uint64(limit)
            for documents, tokens in _chunks(part):
                for split, wanted in (("train", ~held_out), ("validation", held_out)):
                    _append(
                        split, writers[split], part.documents[documents], tokens, (wanted & kept)[documents], totals
                    )
    return totals


def _chunks(part: Part) -> Iterator[tuple[slice, np.ndarray]]:
    """(documents, their tokens), CHUNK_TOKENS or one document at a time."""
    ends = np.cumsum(part.documents["length"], dtype=np.int64)
    start = 0
    while start < len(ends):
        first_token = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, first_token + CHUNK_TOKENS, side="right")))
        yield slice(start, stop), part.tokens[first_token : int(ends[stop - 1])]
        start = stop


def _append(
    split: str,
    writer: IndexedDatasetWriter,
    documents: np.ndarray,
    tokens: np.ndarray,
    wanted: np.ndarray,
    totals: Totals,
) -> None:
    lengths = documents["length"]
    selected = tokens if wanted.all() else tokens[np.repeat(wanted, lengths)]
    lengths = lengths[wanted]
    writer.add_documents(selected, lengths)
    totals.documents[split] += len(lengths)
    totals.tokens[split] += len(selected)
    totals.num_bytes += int(documents["bytes"][wanted].sum())
    totals.space_marks += int(documents["space_mark"][wanted].sum())
    totals.end_markers += int(documents["end_marker"][wanted].sum())
    totals.lengths += np.bincount(np.frexp(lengths)[1] - 1, minlength=len(totals.lengths))
    if split == "validation":
        totals.validation_counts += np.bincount(selected, minlength=len(totals.validation_counts))
