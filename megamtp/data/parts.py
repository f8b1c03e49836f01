"""Parts of a corpus: one shard's tokens and a table of its documents, written by whoever works on it and merged at the
end.

A part's files are named by what they depend on, KEY.bin, KEY.npy and last KEY.json: one that is there is whole and
right, so a preparation that was killed goes on from the parts it finds.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megamtp.data.documents import cut
from megamtp.data.indexed_dataset import LONGEST_SEQUENCE
from megamtp.data.jobs import TokenisationJob
from megamtp.data.records import Reader
from megamtp.data.shards import Shard
from megamtp.data.tokenizer import SPACE_MARK, Tokenizer, open_tokenizer
from megamtp.errors import InputError
from megamtp.files import open_atomically, write_atomically

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 20
# name: what decides the split; text: what decides whether two documents are the same, zeros unless asked for;
# space_mark: whether it holds U+2581, and the tokenizer reads that as a space; end_marker: whether it holds one as
# characters.
DOCUMENT = np.dtype(
    [
        ("name", "<u8"),
        ("text_high", "<u8"),
        ("text_low", "<u8"),
        ("bytes", "<u8"),
        ("length", "<i4"),
        ("space_mark", "?"),
        ("end_marker", "?"),
    ]
)


@dataclass(frozen=True)
class Part:
    """A finished part. tokens [sum of lengths] and documents [documents] of type DOCUMENT are memory-mapped.

    not_utf8 and bad_records are those of Reader.
    """

    tokens: np.ndarray
    documents: np.ndarray
    not_utf8: list[str]
    bad_records: list[str]


def is_finished(shard: Shard, job: TokenisationJob) -> bool:
    """Whether an earlier preparation left this part, without bad records unless they are to be skipped."""
    summary = job.folder / f"{job.key(shard)}.json"
    return summary.is_file() and (job.skip_bad_records or not json.loads(summary.read_bytes())["bad_records"])


def tokenise(shard: Shard, job: TokenisationJob) -> int:
    """Writes the shard's part; returns the bytes of input that it stands for.

    Raises:
        InputError: as Reader.documents does, or a document is too long.
        OSError: it cannot be written.
    """
    tokenizer, stem = _tokenizer(job.tokenizer), job.folder / job.key(shard)
    reader = Reader(job.json_key, job.skip_bad_records)
    tables = [np.empty(0, DOCUMENT)]
    with open_atomically(stem.with_suffix(".bin")) as stream:
        for batch in _batches(_documents(shard, job, reader)):
            tokens, lengths = tokenizer.encode_documents([text for _, text in batch])
            stream.write(tokens.data)
            tables.append(_table(batch, lengths, job, tokenizer))
    documents = np.concatenate(tables)
    with open_atomically(stem.with_suffix(".npy")) as stream:
        np.save(stream, documents)
    summary = {"documents": len(documents), "not_utf8": reader.not_utf8, "bad_records": reader.bad_records}
    write_atomically(stem.with_suffix(".json"), json.dumps(summary).encode())
    return shard.num_bytes


def open_part(shard: Shard, job: TokenisationJob, dtype: np.dtype) -> Part:
    """A finished part whose tokens are of type `dtype`."""
    stem = job.folder / job.key(shard)
    summary = json.loads(stem.with_suffix(".json").read_bytes())
    passed_over = summary["not_utf8"], summary["bad_records"]
    if not summary["documents"]:  # an empty file cannot be mapped
        return Part(np.empty(0, dtype), np.empty(0, DOCUMENT), *passed_over)
    tokens = np.memmap(stem.with_suffix(".bin"), dtype, mode="r")
    return Part(tokens, np.load(stem.with_suffix(".npy"), mmap_mode="r"), *passed_over)


def _documents(shard: Shard, job: TokenisationJob, reader: Reader) -> Iterator[tuple[str, str]]:
    for span in shard.spans:
        for name, text in reader.documents(span):
            if name not in span.skipped:
                yield from cut(name, text, span.first_piece) if job.in_pieces else [(name, text)]


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return open_tokenizer(path)


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _table(batch: list[tuple[str, str]], lengths: np.ndarray, job: TokenisationJob, tokenizer: Tokenizer) -> np.ndarray:
    table = np.zeros(len(batch), DOCUMENT)
    table["name"] = [split_hash(job.seed, name) for name, _ in batch]
    encoded = [text.encode() for _, text in batch]
    table["bytes"] = [len(text) for text in encoded]
    table["length"] = lengths
    if not tokenizer.keeps_space_marks:
        table["space_mark"] = [SPACE_MARK in text for _, text in batch]
    table["end_marker"] = [any(marker in text for marker in tokenizer.end_markers) for _, text in batch]
    if lengths.max() > LONGEST_SEQUENCE:
        name = batch[int(lengths.argmax())][0]
        raise InputError(f"{name}: {lengths.max()} tokens, expected at most {LONGEST_SEQUENCE} in a document: cut it")
    if job.with_text_hashes:
        hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in encoded)
        table["text_high"], table["text_low"] = np.frombuffer(hashes, "<u8").reshape(-1, 2).T
    return table


def split_hash(seed: int, name: str) -> int:
    """Documents of the smallest hashes are held out; the same name gets the same one."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
