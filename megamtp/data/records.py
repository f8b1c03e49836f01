"""Reads documents out of files: text, JSON lines (either also .gz and .zst) and Parquet, whole files or spans of them.

A document's name is its file's, for JSON lines with the byte and for Parquet with the row where it begins: what a shard's
worker can know without reading the shards before.
"""

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megamtp.data import compression
from megamtp.data.compression import open_binary
from megamtp.data.optional import require
from megamtp.errors import InputError

JSON_LINES, JSON, PARQUET, TEXT = ".jsonl", ".json", ".parquet", ".txt"
# JSON can spell these ("\ud800"), UTF-8 cannot.
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Span:
    """Documents of one file.

    Attributes:
        name: identifies the file whatever folder it lies in.
        start, stop: JSON lines that begin in these bytes, these row groups of Parquet, or these bytes of a text that is cut in
            pieces; stop None: all of the file.
        first_piece: number of the first piece of such a text.
        skipped: names of documents that are left out.
    """

    name: str
    path: Path
    start: int = 0
    stop: int | None = None
    first_piece: int = 0
    skipped: tuple[str, ...] = ()


def kind(path: Path) -> str:
    """JSON_LINES, PARQUET or TEXT, by the suffix before any compression's; .json files hold JSON lines, too."""
    if content_suffix(path) in (JSON_LINES, JSON):
        return JSON_LINES
    return PARQUET if path.suffix.lower() == PARQUET else TEXT


def content_suffix(path: Path) -> str:
    """The suffix before any compression's, in small letters."""
    return (Path(path.stem).suffix if compression.suffix(path) else path.suffix).lower()


def read(span: Span, json_key: str, not_utf8: list[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of every document that is not empty.

    Args:
        json_key: of a JSON line or Parquet column that holds the text.
        not_utf8: gets the names of text files that are passed over because they are not UTF-8.

    Raises:
        InputError: the file cannot be read or is damaged, or a record has no text under json_key.
    """
    readers = {JSON_LINES: _json_lines, PARQUET: _parquet}
    with _readable(span.path):
        if reader := readers.get(kind(span.path)):
            yield from reader(span, json_key)
        elif (text := _text(span, not_utf8)) is not None:
            yield span.name, text


def num_row_groups(path: Path) -> int:
    """Of a Parquet file. Raises InputError: it cannot be read or is damaged."""
    with _readable(path), _open_parquet(path) as file:
        return file.num_row_groups


def _text(span: Span, not_utf8: list[str]) -> str | None:
    with open_binary(span.path) as stream:
        if span.stop is not None:
            stream.seek(span.start)
        content = stream.read(-1 if span.stop is None else span.stop - span.start)
    try:
        return content.decode() or None  # not read_text: line ends stay as they are
    except UnicodeDecodeError:
        not_utf8.append(span.name)
        return None


def _json_lines(span: Span, json_key: str) -> Iterator[tuple[str, str]]:
    with open_binary(span.path) as stream:
        place = span.start
        if place:
            stream.seek(place - 1)
            place += len(stream.readline()) - 1
        for number, line in enumerate(stream):
            if span.stop is not None and place >= span.stop:
                break
            try:
                text = _json_text(line.removeprefix(b"\xef\xbb\xbf") if place == 0 else line, json_key)
            except InputError as error:
                raise InputError(f"{span.path}:{_lines_before(span) + number + 1}: {error}") from None
            if text:
                yield f"{span.name}/{place}", text
            place += len(line)


def _lines_before(span: Span) -> int:
    """The number of lines that begin before the span; read only for a message."""
    if not span.start:
        return 0
    with open(span.path, "rb") as stream:
        stream.seek(span.start - 1)
        end = span.start - 1 + len(stream.readline())
        stream.seek(0)
        return sum(stream.read(min(BLOCK_BYTES, end - at)).count(b"\n") for at in range(0, end, BLOCK_BYTES))


def _json_text(line: bytes, json_key: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}); expected one object a line: mend the line, or leave the file out") from None
    if not isinstance(record, dict):
        raise InputError(f"a JSON {type(record).__name__}; expected one object a line: mend the line, or leave the file out")
    text = record.get(json_key)
    if not isinstance(text, str):
        if json_key in record:
            found = "null" if text is None else type(text).__name__
            raise InputError(f"{json_key!r} is {found}; expected a string: mend the line or give another --json-key")
        raise InputError(f"no text under {json_key!r} (found: {', '.join(map(repr, record))}); give the right one with --json-key")
    if b"\\u" in line and LONE_SURROGATE.search(text):
        raise InputError(f"half a surrogate pair under {json_key!r}; expected Unicode text: mend the line")
    return text


def _parquet(span: Span, json_key: str) -> Iterator[tuple[str, str]]:
    with _open_parquet(span.path) as file:
        _check_column(span.path, file.schema_arrow, json_key)
        stop = file.num_row_groups if span.stop is None else span.stop
        row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
        groups = list(range(span.start, stop))
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[json_key], use_threads=False):
            for value in batch.column(0):
                text = _cell_text(f"{span.path}:row {row}", value, json_key)
                if text:
                    yield f"{span.name}/{row}", text
                row += 1


def _check_column(path: Path, schema, json_key: str) -> None:
    pyarrow = require("pyarrow")
    if json_key not in schema.names:
        found = ", ".join(map(repr, schema.names))
        raise InputError(f"{path}: no column {json_key!r} (found: {found}); give the right one with --json-key")
    column = schema.field(json_key).type
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(), pyarrow.large_binary())
    if column not in texts:
        raise InputError(f"{path}: column {json_key!r} holds {column}, expected strings; give the right one with --json-key")


def _cell_text(place: str, value, json_key: str) -> str:
    try:
        text = value.as_py()
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 ({error}); expected text: mend the row or leave the file out") from None
    if text is None:
        raise InputError(
            f"{place}: no text under {json_key!r} (found: null); expected a string: mend the row or leave the file out"
        )
    return text


def _open_parquet(path: Path):
    return require("pyarrow.parquet").ParquetFile(path, pre_buffer=False)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of reading `path` as one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or ' '.join(str(error).split())}; expected a readable file: mend it or leave it out"
        ) from None
    except (EOFError, zlib.error) as error:
        raise _damaged(path, error) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("pyarrow", "zstandard"):
            raise
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: damaged ({' '.join(str(error).split())}); expected a whole file: fetch it again or leave it out")
