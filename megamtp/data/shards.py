"""Cuts inputs into shards: the same ones whoever works on them, so the corpus does not depend on the number of workers."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megamtp.data import records
from megamtp.data.records import Span
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

    def documents(self, json_key: str, not_utf8: list[str]) -> Iterator[tuple[str, str]]:
        """(name, text) of every document that is not empty. Raises InputError as records.read does."""
        for span in self.spans:
            yield from records.read(span, json_key, not_utf8)


def plan(files: list[tuple[str, Path]]) -> list[Shard]:
    """The shards of named files. Raises InputError: a file is missing, or damaged Parquet."""
    try:
        found = [(name, path, path.stat()) for name, path in files]
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; expected a readable file: mend it or leave it out") from None
    total = sum(status.st_size for _, _, status in found)
    wanted = min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, total // SHARDS))
    shards, spans, size, digest = [], [], 0, hashlib.sha256()
    for name, path, status in found:
        for span, num_bytes in _spans(name, path, status.st_size, wanted):
            spans.append(span)
            size += num_bytes
            digest.update(f"\n{name}\t{span.start}\t{span.stop}\t{status.st_size}\t{status.st_mtime_ns}".encode())
            if size >= wanted:
                shards.append(Shard(tuple(spans), size, digest.hexdigest()))
                spans, size, digest = [], 0, hashlib.sha256()
    return [*shards, Shard(tuple(spans), size, digest.hexdigest())] if spans else shards


def _spans(name: str, path: Path, size: int, wanted: int) -> Iterator[tuple[Span, int]]:
    """(span, its share of the file's bytes) of a file: several of about `wanted` bytes if it is large and can be cut."""
    number, units = max(1, size // wanted), size
    kind = records.kind(path)
    if number > 1 and kind == records.PARQUET:
        number = min(number, units := records.num_row_groups(path))
    if number < 2 or kind == records.TEXT or path.suffix in records.COMPRESSIONS:
        yield Span(name, path), size
        return
    bounds = [units * index // number for index in range(number + 1)]
    for start, stop in pairwise(bounds):
        yield Span(name, path, start, stop), size * stop // units - size * start // units
