"""Reads documents out of files: text, JSON lines (either also compressed) and Parquet, whole files or spans of them.

A document's name is its file's, for JSON lines with the byte and for Parquet with the row where it begins: what a
shard's worker can know without reading the shards before.
"""

import codecs
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megamtp.data import compression
from megamtp.data.compression import open_binary
from megamtp.data.optional import require
from megamtp.errors import InputError

TEXT, JSON_LINES, PARQUET = FORMATS = ("text", "jsonl", "parquet")
FORMAT_OF_SUFFIX = {".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".parquet": PARQUET}
# A file's format is recognised by at most so many bytes, of a file that begins as a JSON object by so many.
START_BYTES = 1 << 16
JSON_START_BYTES = 1 << 24
START_LINES = 10
# JSON can spell these ("\ud800"), UTF-8 cannot.
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 1024
# A number's value is not used; int() refuses those of more than 4300 digits.
DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits[:9]))


@dataclass(frozen=True)
class Span:
    """Documents of one file.

    Attributes:
        name: identifies the file whatever folder it lies in.
        format: one of FORMATS.
        start, stop: JSON lines that begin in these bytes, these row groups of Parquet, or these bytes of a text that is
            cut in pieces; stop None: all of the file.
        first_piece: number of the first piece of such a text.
        skipped: names of documents that are left out.
    """

    name: str
    path: Path
    format: str
    start: int = 0
    stop: int | None = None
    first_piece: int = 0
    skipped: tuple[str, ...] = ()


class _BadRecord(Exception):
    """What was found in a record, and what was expected instead."""

    def __init__(self, found: str, expected: str):
        super().__init__(found, expected)
        self.found, self.expected = found, expected


@dataclass
class Reader:
    """Reads documents and keeps account of what it passes over.

    Attributes:
        json_key: of a JSON line or Parquet column that holds the text.
        skip_bad_records: pass over JSON lines and Parquet rows without a text, instead of refusing them.
        not_utf8: names of text files that were passed over because they are not UTF-8.
        bad_records: places of records that were passed over, each with what was found there.
    """

    json_key: str = "text"
    skip_bad_records: bool = False
    not_utf8: list[str] = field(default_factory=list)
    bad_records: list[str] = field(default_factory=list)

    def documents(self, span: Span) -> Iterator[tuple[str, str]]:
        """(name, text) of every document that is not empty.

        Raises:
            InputError: the file cannot be read or is damaged, or a record has no text under json_key and may not be
                skipped.
        """
        read = {TEXT: self._text, JSON_LINES: self._json_lines, PARQUET: self._parquet}[span.format]
        with _readable(span.path):
            yield from read(span)

    def _text(self, span: Span) -> Iterator[tuple[str, str]]:
        with open_binary(span.path) as stream:
            if span.stop is not None:
                stream.seek(span.start)
            content = stream.read(-1 if span.stop is None else span.stop - span.start)
        if span.start == 0:
            content = content.removeprefix(codecs.BOM_UTF8)
        try:
            text = content.decode()  # not read_text: line ends stay as they are
        except UnicodeDecodeError:
            self.not_utf8.append(span.name)
            return
        if text:
            yield span.name, text

    def _json_lines(self, span: Span) -> Iterator[tuple[str, str]]:
        lines_before = None
        with open_binary(span.path) as stream:
            place = span.start
            if place:
                stream.seek(place - 1)
                place += len(stream.readline()) - 1
            for number, line in enumerate(stream, start=1):
                if span.stop is not None and place >= span.stop:
                    break
                try:
                    text = _json_text(line.removeprefix(codecs.BOM_UTF8) if place == 0 else line, self.json_key)
                except _BadRecord as bad:
                    text, lines_before = "", _lines_before(span) if lines_before is None else lines_before
                    self._pass_over(bad, span, str(lines_before + number))
                if text:
                    yield f"{span.name}/{place}", text
                place += len(line)

    def _parquet(self, span: Span) -> Iterator[tuple[str, str]]:
        with _open_parquet(span.path) as file:
            _check_column(span.path, file.schema_arrow, self.json_key)
            stop = file.num_row_groups if span.stop is None else span.stop
            row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
            groups = list(range(span.start, stop))
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[self.json_key], use_threads=False):
                for value in batch.column(0):
                    try:
                        text = _cell_text(value, self.json_key)
                    except _BadRecord as bad:
                        text = ""
                        self._pass_over(bad, span, f"row {row}")
                    if text:
                        yield f"{span.name}/{row}", text
                    row += 1

    def _pass_over(self, bad: _BadRecord, span: Span, place: str) -> None:
        """Raises InputError: bad records may not be skipped."""
        if not self.skip_bad_records:
            raise InputError(
                f"{span.path}:{place}: {bad.found}; {bad.expected}, or skip bad records with --on-bad-record skip"
            )
        self.bad_records.append(f"{span.name}:{place}: {bad.found}")


def content_suffix(path: Path) -> str:
    """The suffix before any compression's, in small letters."""
    return (Path(path.stem).suffix if compression.suffix(path) else path.suffix).lower()


def recognise(path: Path, json_key: str, is_named: bool) -> str | None:
    """The format of a file, one of FORMATS, by its name or else by its first bytes; None: it is binary.

    A file is JSON lines if most of its first ten lines are JSON objects. If it has but one line, a JSON object, it may
    as well be a program's settings, and has to have json_key.

    Args:
        is_named: the file is named as an input, instead of found in a folder: .json then means JSON lines.

    Raises:
        InputError: it cannot be read, is damaged, or holds records in another form than JSON lines.
    """
    suffix = content_suffix(path)
    if found := JSON_LINES if suffix == ".json" and is_named else FORMAT_OF_SUFFIX.get(suffix):
        return found
    with _readable(path), open_binary(path) as stream:
        start = stream.read(START_BYTES)
        is_whole = len(start) < START_BYTES
        if b"\0" in start:
            return PARQUET if start.startswith(b"PAR1") and not compression.suffix(path) else None
        start = start.removeprefix(codecs.BOM_UTF8)
        if not is_whole and start.lstrip().startswith(b"{") and start.count(b"\n") < START_LINES:
            start += (more := stream.read(JSON_START_BYTES))
            is_whole = len(more) < JSON_START_BYTES
    lines = start.split(b"\n")
    if not is_whole and len(lines) == 1 and start.lstrip().startswith(b"{"):
        raise InputError(
            f"{path}: begins as JSON, with a line of more than {JSON_START_BYTES >> 20} MiB; expected JSON lines or "
            "text: say which with --format, or leave the file out with --exclude"
        )
    objects = [_object(line) for line in islice(filter(bytes.strip, lines if is_whole else lines[:-1]), START_LINES)]
    if len(objects) == 1 and is_whole and objects[0] is not None:
        return JSON_LINES if is_named or json_key in objects[0] else TEXT
    num_objects = sum(found is not None for found in objects)
    if objects and 2 * num_objects + (objects[0] is not None) > len(objects):
        return JSON_LINES
    _refuse_other_records(path, start, json_key)
    return TEXT


def _object(line: bytes) -> dict | None:
    """The JSON object that is in this line, if there is one."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        return DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None


def _refuse_other_records(path: Path, start: bytes, json_key: str) -> None:
    """Raises InputError: the first JSON value at the start of a file, or in an array there, is an object with a
    text.
    """
    text = start.decode(errors="replace").lstrip().removeprefix("[").lstrip()
    try:
        record, _ = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return
    if isinstance(record, dict) and isinstance(record.get(json_key), str):
        raise InputError(
            f"{path}: JSON with {json_key!r}, but most of its first lines are not JSON objects; expected one object a "
            "line: convert it, as with `jq -c`, read it as it is with --format text, or leave it out with --exclude"
        )


def num_row_groups(path: Path) -> int:
    """Of a Parquet file. Raises InputError: it cannot be read or is damaged."""
    with _readable(path), _open_parquet(path) as file:
        return file.num_row_groups


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
    one_object = "expected one object a line: mend the line, leave the file out, or read it as text with --format text"
    try:
        record = DECODER.decode(line.decode())
    except (ValueError, RecursionError) as error:
        raise _BadRecord(f"not JSON ({error})", one_object) from None
    if not isinstance(record, dict):
        raise _BadRecord(f"a JSON {type(record).__name__}", one_object)
    text = record.get(json_key)
    if not isinstance(text, str):
        if json_key in record:
            found = "null" if text is None else type(text).__name__
            raise _BadRecord(f"{json_key!r} is {found}", "expected a string: mend the line or give another --json-key")
        keys = ", ".join(map(repr, record))
        raise _BadRecord(f"no text under {json_key!r} (found: {keys})", "give the right one with --json-key")
    if b"\\u" in line and LONE_SURROGATE.search(text):
        raise _BadRecord(f"half a surrogate pair under {json_key!r}", "expected Unicode text: mend the line")
    return text


def _check_column(path: Path, schema: Any, json_key: str) -> None:
    pyarrow = require("pyarrow")
    if json_key not in schema.names:
        found = ", ".join(map(repr, schema.names))
        raise InputError(f"{path}: no column {json_key!r} (found: {found}); give the right one with --json-key")
    column = values = schema.field(json_key).type
    if pyarrow.types.is_dictionary(column):
        values = column.value_type
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    if values not in (*texts, pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()):
        raise InputError(
            f"{path}: column {json_key!r} holds {column}, expected strings; give the right one with --json-key"
        )


def _cell_text(value: Any, json_key: str) -> str:
    try:
        text = value.as_py()
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise _BadRecord(f"not UTF-8 ({error})", "expected text: mend the row or leave the file out") from None
    if text is None:
        found = f"no text under {json_key!r} (found: null)"
        raise _BadRecord(found, "expected a string: mend the row or leave the file out")
    return text


def _open_parquet(path: Path) -> Any:
    return require("pyarrow.parquet").ParquetFile(path, pre_buffer=False)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of reading `path` as one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or ' '.join(str(error).split())}; expected a readable file: mend it or leave it "
            "out"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("pyarrow", "zstandard"):
            raise
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: damaged ({' '.join(str(error).split())}); expected a whole file: fetch it again or leave it out"
    )
