"""Tokenises the shards of the inputs. Each worker writes a shard's tokens and a table of its documents.

The name of a tokenised shard's files is a key that depends on its inputs and settings. KEY.json is written after
KEY.bin and KEY.npy, so if it exists, the others are complete, and a preparation that was killed can resume from them.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megamtp.data.indexed_dataset import LONGEST_SEQUENCE
from megamtp.data.input_files import cut_into_pieces
from megamtp.data.records import Reader
from megamtp.data.shards import Shard
from megamtp.data.tokenisation import TokenisationTask
from megamtp.data.tokenizer import SPACE_MARK, Tokenizer, open_tokenizer
from megamtp.errors import InputError
from megamtp.files import open_atomically, write_atomically

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 20
# A row of the document table:
#   name_hash             split_hash of the document's name, which decides the split
#   text_high, text_low   a 128-bit hash of the text, to find duplicates; zeros unless with_text_hashes
#   bytes, length         the size of the text in UTF-8 bytes and in tokens, with the end-of-document token
#   space_mark            the text holds U+2581, and the tokenizer reads that as a space
#   end_marker            the text holds an end-of-text marker, which is tokenised as ordinary characters
DOCUMENT = np.dtype(
    [
        ("name_hash", "<u8"),
        ("text_high", "<u8"),
        ("text_low", "<u8"),
        ("bytes", "<u8"),
        ("length", "<i4"),
        ("space_mark", "?"),
        ("end_marker", "?"),
    ]
)


@dataclass(frozen=True)
class TokenisedShard:
    """A tokenised shard.

    Attributes:
        tokens: [sum of lengths], memory-mapped.
        documents: [documents] of type DOCUMENT, memory-mapped.
        not_utf8, bad_records: see Reader.
    """

    tokens: np.ndarray
    documents: np.ndarray
    not_utf8: list[str]
    bad_records: list[str]


def is_tokenised(shard: Shard, task: TokenisationTask) -> bool:
    """Returns whether an earlier preparation tokenised this shard, without bad records unless the task skips them."""
    summary = task.folder / f"{task.key(shard)}.json"
    return summary.is_file() and (task.skip_bad_records or not json.loads(summary.read_bytes())["bad_records"])


def tokenise(shard: Shard, task: TokenisationTask) -> int:
    """Tokenises a shard and writes its files. Returns the number of its input bytes.

    Raises:
        InputError: a document cannot be read (see Reader.documents) or is too long.
        OSError: a file cannot be written.
    """
    tokenizer, stem = _tokenizer(task.tokenizer), task.folder / task.key(shard)
    reader = Reader(task.json_key, task.skip_bad_records)
    tables = [np.empty(0, DOCUMENT)]
    with open_atomically(stem.with_suffix(".bin")) as stream:
        for batch in _batches(_documents(shard, task, reader)):
            tokens, lengths = tokenizer.encode_documents([text for _, text in batch])
            stream.write(tokens.data)
            tables.append(_table(batch, lengths, task, tokenizer))
    documents = np.concatenate(tables)
    with open_atomically(stem.with_suffix(".npy")) as stream:
        np.save(stream, documents)
    summary = {"documents": len(documents), "not_utf8": reader.not_utf8, "bad_records": reader.bad_records}
    write_atomically(stem.with_suffix(".json"), json.dumps(summary).encode())
    return shard.num_bytes


def open_tokenised_shard(shard: Shard, task: TokenisationTask, dtype: np.dtype) -> TokenisedShard:
    """Opens a tokenised shard whose tokens are of type `dtype`."""
    stem = task.folder / task.key(shard)
    summary = json.loads(stem.with_suffix(".json").read_bytes())
    passed_over = summary["not_utf8"], summary["bad_records"]
    if not summary["documents"]:  # an empty file cannot be mapped
        return TokenisedShard(np.empty(0, dtype), np.empty(0, DOCUMENT), *passed_over)
    tokens = np.memmap(stem.with_suffix(".bin"), dtype, mode="r")
    return TokenisedShard(tokens, np.load(stem.with_suffix(".npy"), mmap_mode="r"), *passed_over)


def _documents(shard: Shard, task: TokenisationTask, reader: Reader) -> Iterator[tuple[str, str]]:
    for span in shard.spans:
        for name, text in reader.documents(span):
            if name not in span.skipped:
                yield from cut_into_pieces(name, text, span.first_piece) if task.cuts_documents else [(name, text)]


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return open_tokenizer(path)


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, num_characters = [], 0
    for document in documents:
        batch.append(document)
        num_characters += len(document[1])
        if len(batch) == BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _table(
    batch: list[tuple[str, str]], lengths: np.ndarray, task: TokenisationTask, tokenizer: Tokenizer
) -> np.ndarray:
    table = np.zeros(len(batch), DOCUMENT)
    table["name_hash"] = [split_hash(task.seed, name) for name, _ in batch]
    encoded = [text.encode() for _, text in batch]
    table["bytes"] = [len(text) for text in encoded]
    table["length"] = lengths
    if not tokenizer.keeps_space_marks:
        table["space_mark"] = [SPACE_MARK in text for _, text in batch]
    table["end_marker"] = [any(marker in text for marker in tokenizer.end_markers) for _, text in batch]
    if lengths.max() > LONGEST_SEQUENCE:
        name = batch[int(lengths.argmax())][0]
        raise InputError(
            f"{name}: {lengths.max()} tokens; expected at most {LONGEST_SEQUENCE} in a document: split the document"
        )
    if task.with_text_hashes:
        hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in encoded)
        table["text_high"], table["text_low"] = np.frombuffer(hashes, "<u8").reshape(-1, 2).T
    return table


def split_hash(seed: int, name: str) -> int:
    """Returns a 64-bit hash of a document's name. The documents with the smallest hashes are held out."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
