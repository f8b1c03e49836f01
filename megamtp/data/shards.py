"""Cuts the input files into shards. Shards do not depend on the number of workers, so the corpus does not either."""

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from megamtp.data import compression
from megamtp.data.input_files import cut_into_pieces
from megamtp.data.records import PARQUET, TEXT, Reader, Span, num_row_groups
from megamtp.errors import InputError

# A shard is 1/256 of the inputs, within these limits. That is enough shards to keep all workers busy to the end, and
# so small that a killed preparation loses only seconds of work.
MIN_SHARD_BYTES = 1 << 20
MAX_SHARD_BYTES = 128 << 20
NUM_SHARDS = 256


@dataclass(frozen=True)
class Shard:
    """A part of the input files that one worker tokenises at a time.

    Attributes:
        spans: in the order of the inputs.
        num_bytes: their size in the input files, which may be compressed.
        fingerprint: a hash of the spans and of the files' sizes and modification times.
    """

    spans: tuple[Span, ...]
    num_bytes: int
    fingerprint: str

    def documents(self, reader: Reader) -> Iterator[tuple[str, str]]:
        """Yields (name, text) of every document that is not empty. Raises InputError: see Reader.documents."""
        for span in self.spans:
            yield from reader.documents(span)


def cut_into_shards(
    files: list[Span], cuts_documents: bool, skipped: list[tuple[str, ...]] | None = None
) -> list[Shard]:
    """Returns the shards of whole files, in order.

    Args:
        cuts_documents: whether documents are cut into pieces, so that a text file may be spread over several shards.
        skipped: for each file, the names of documents to leave out; None: no documents.

    Raises:
        InputError: a file is missing, unreadable or damaged.
    """
    try:
        statuses = [file.path.stat() for file in files]
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; expected a readable file: fix it or leave it out"
        ) from None
    total_bytes = sum(status.st_size for status in statuses)
    shard_bytes = min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, total_bytes // NUM_SHARDS))
    shards, spans, size, digest = [], [], 0, hashlib.sha256()
    for file, status, left_out in zip(files, statuses, skipped or [()] * len(files), strict=True):
        for span, num_bytes in _spans(file, status.st_size, shard_bytes, cuts_documents):
            spans.append(replace(span, skipped=left_out))
            size += num_bytes
            state = (status.st_size, status.st_mtime_ns, left_out)
            digest.update(f"\n{span.name}\t{span.format}\t{span.start}\t{span.stop}\t{state}".encode())
            if size >= shard_bytes:
                shards.append(Shard(tuple(spans), size, digest.hexdigest()))
                spans, size, digest = [], 0, hashlib.sha256()
    return [*shards, Shard(tuple(spans), size, digest.hexdigest())] if spans else shards


def _spans(file: Span, file_bytes: int, shard_bytes: int, cuts_documents: bool) -> Iterator[tuple[Span, int]]:
    """Yields (span, its number of bytes): the whole file, or spans of about `shard_bytes` if the file can be cut."""
    num_spans, units = max(1, file_bytes // shard_bytes), file_bytes
    if num_spans > 1 and file.format == PARQUET:
        num_spans = min(num_spans, units := num_row_groups(file.path))
    if num_spans < 2 or compression.suffix(file.path) or (file.format == TEXT and not cuts_documents):
        yield file, file_bytes
        return
    if file.format == TEXT:
        yield from _text_spans(file, shard_bytes)
        return
    bounds = [units * index // num_spans for index in range(num_spans + 1)]
    for start, stop in pairwise(bounds):
        yield replace(file, start=start, stop=stop), file_bytes * stop // units - file_bytes * start // units


def _text_spans(file: Span, shard_bytes: int) -> Iterator[tuple[Span, int]]:
    """Yields spans of whole pieces without the byte order mark, or the whole file if it is not UTF-8 or empty."""
    with open(file.path, "rb") as stream:
        start = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    stop, first = start, 0
    pieces = [piece for name, text in Reader().documents(file) for _, piece in cut_into_pieces(name, text)]
    for number, piece in enumerate(pieces, start=1):
        stop += len(piece.encode())
        if stop - start >= shard_bytes or number == len(pieces):
            yield replace(file, start=start, stop=stop, first_piece=first), stop - start
            start, first = stop, number
    if not pieces:
        yield file, file.path.stat().st_size
