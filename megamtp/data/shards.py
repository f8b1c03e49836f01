"""Cuts inputs into shards: the same ones whoever works on them, so the corpus does not depend on the number of
workers.
"""

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from megamtp.data import compression
from megamtp.data.documents import cut
from megamtp.data.records import PARQUET, TEXT, Reader, Span, num_row_groups
from megamtp.errors import InputError

# A shard is a 256th of the inputs within these limits: enough of them to keep workers busy to the end, and a
# killed preparation loses seconds of work.
MIN_SHARD_BYTES = 1 << 20
MAX_SHARD_BYTES = 128 << 20
SHARDS = 256


@dataclass(frozen=True)
class Shard:
    """What one worker reads at a time, in the order of the inputs.

    Attributes:
        num_bytes: of the input files, compressed as they are.
        fingerprint: changes with the spans and with the files' sizes and times of change.
    """

    spans: tuple[Span, ...]
    num_bytes: int
    fingerprint: str

    def documents(self, reader: Reader) -> Iterator[tuple[str, str]]:
        """(name, text) of every document that is not empty. Raises InputError as Reader.documents does."""
        for span in self.spans:
            yield from reader.documents(span)


def plan(files: list[Span], in_pieces: bool, skipped: list[tuple[str, ...]] | None = None) -> list[Shard]:
    """The shards of whole files.

    Args:
        in_pieces: documents are cut in pieces, so a text file may lie in several shards.
        skipped: for each file names of documents that are left out; None: none.

    Raises:
        InputError: a file is missing or cannot be read, or damaged Parquet.
    """
    try:
        found = [(file, file.path.stat()) for file in files]
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; expected a readable file: mend it or leave it out"
        ) from None
    total = sum(status.st_size for _, status in found)
    wanted = min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, total // SHARDS))
    shards, spans, size, digest = [], [], 0, hashlib.sha256()
    for (file, status), left_out in zip(found, skipped or [()] * len(found), strict=True):
        for span, num_bytes in _spans(file, status.st_size, wanted, in_pieces):
            spans.append(replace(span, skipped=left_out))
            size += num_bytes
            state = (status.st_size, status.st_mtime_ns, left_out)
            digest.update(f"\n{span.name}\t{span.format}\t{span.start}\t{span.stop}\t{state}".encode())
            if size >= wanted:
                shards.append(Shard(tuple(spans), size, digest.hexdigest()))
                spans, size, digest = [], 0, hashlib.sha256()
    return [*shards, Shard(tuple(spans), size, digest.hexdigest())] if spans else shards


def _spans(file: Span, size: int, wanted: int, in_pieces: bool) -> Iterator[tuple[Span, int]]:
    """(span, its share of the file's bytes) of a file: several of about `wanted` bytes if it is large and can be
    cut.
    """
    number, units = max(1, size // wanted), size
    if number > 1 and file.format == PARQUET:
        number = min(number, units := num_row_groups(file.path))
    if number < 2 or compression.suffix(file.path) or (file.format == TEXT and not in_pieces):
        yield file, size
        return
    if file.format == TEXT:
        yield from _text_spans(file, wanted)
        return
    bounds = [units * index // number for index in range(number + 1)]
    for start, stop in pairwise(bounds):
        yield replace(file, start=start, stop=stop), size * stop // units - size * start // units


def _text_spans(file: Span, wanted: int) -> Iterator[tuple[Span, int]]:
    """Spans of whole pieces; all of a text that is not UTF-8 or empty. None of them has a byte order mark."""
    with open(file.path, "rb") as stream:
        start = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    stop, first = start, 0
    pieces = [piece for name, text in Reader().documents(file) for _, piece in cut(name, text)]
    for number, piece in enumerate(pieces, start=1):
        stop += len(piece.encode())
        if stop - start >= wanted or number == len(pieces):
            yield replace(file, start=start, stop=stop, first_piece=first), stop - start
            start, first = stop, number
    if not pieces:
        yield file, file.path.stat().st_size
