"""Reads documents from text files, JSON lines (both may be compressed) and Parquet, from whole files or from spans.

A document's name is the name of its file, plus the byte offset of a JSON line or the number of a Parquet row. A worker
knows these without reading earlier shards.
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
# A file's format is detected from its first START_BYTES, or JSON_START_BYTES if it begins like a JSON object.
START_BYTES = 1 << 16
JSON_START_BYTES = 1 << 24
START_LINES = 10
# JSON can encode these ("\ud800"), but UTF-8 cannot.
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 1024
# The values of numbers are not used, and int() refuses more than 4300 digits, so only the first digits are parsed.
DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits[:9]))


@dataclass(frozen=True)
class Span:
    """A whole file, or a range of its documents.

    Attributes:
        name: identifies the file, and does not depend on where the input folder lies.
        format: one of FORMATS.
        start, stop: a range of bytes in which JSON lines begin, of Parquet row groups, or of the bytes of a text that
            is cut into pieces. stop=None: up to the end of the file.
        first_piece: the number of the first piece of a text that is cut into pieces.
        skipped: names of documents to leave out.
    """

    name: str
    path: Path
    format: str
    start: int = 0
    stop: int | None = None
    first_piece: int = 0
    skipped: tuple[str, ...] = ()


class _BadRecord(Exception):
    """A record without a valid text.

    Attributes:
        problem: what the record holds.
        expected: what it should hold, and the remedy.
    """

    def __init__(self, problem: str, expected: str):
        super().__init__(problem, expected)
        self.problem, self.expected = problem, expected


@dataclass
class Reader:
    """Reads documents, and records which files and records it skips.

    Attributes:
        json_key: the key of a JSON line, or the Parquet column, that holds the text.
        skip_bad_records: skip JSON lines and Parquet rows without a valid text, instead of raising an error.
        not_utf8: names of text files that were passed over because they are not UTF-8.
        bad_records: records that were skipped, as "file:line: problem".
    """

    json_key: str = "text"
    skip_bad_records: bool = False
    not_utf8: list[str] = field(default_factory=list)
    bad_records: list[str] = field(default_factory=list)

    def documents(self, span: Span) -> Iterator[tuple[str, str]]:
        """Yields (name, text) of every document that is not empty.

        Raises:
            InputError: the file cannot be read or is damaged, or a record has no valid text and may not be skipped.
        """
        read = {TEXT: self._text, JSON_LINES: self._json_lines, PARQUET: self._parquet}[span.format]
        with _reading_errors(span.path):
            yield from read(span)

    def _text(self, span: Span) -> Iterator[tuple[str, str]]:
        with open_binary(span.path) as stream:
            if span.stop is not None:
                stream.seek(span.start)
            content = stream.read(-1 if span.stop is None else span.stop - span.start)
        if span.start == 0:
            content = content.removeprefix(codecs.BOM_UTF8)
        try:
            text = content.decode()  # unlike read_text, this keeps line ends unchanged
        except UnicodeDecodeError:
            self.not_utf8.append(span.name)
            return
        if text:
            yield span.name, text

    def _json_lines(self, span: Span) -> Iterator[tuple[str, str]]:
        lines_before = None
        with open_binary(span.path) as stream:
            offset = span.start
            if offset:
                stream.seek(offset - 1)
                offset += len(stream.readline()) - 1
            for number, line in enumerate(stream, start=1):
                if span.stop is not None and offset >= span.stop:
                    break
                try:
                    text = _json_text(line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line, self.json_key)
                except _BadRecord as bad:
                    text, lines_before = "", _lines_before(span) if lines_before is None else lines_before
                    self._skip(bad, span, str(lines_before + number))
                if text:
                    yield f"{span.name}/{offset}", text
                offset += len(line)

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
                        self._skip(bad, span, f"row {row}")
                    if text:
                        yield f"{span.name}/{row}", text
                    row += 1

    def _skip(self, bad: _BadRecord, span: Span, line: str) -> None:
        """Notes a bad record. Raises InputError if bad records may not be skipped."""
        if not self.skip_bad_records:
            raise InputError(
                f"{span.path}:{line}: {bad.problem}; {bad.expected}, or skip bad records with --on-bad-record skip"
            )
        self.bad_records.append(f"{span.name}:{line}: {bad.problem}")


def content_suffix(path: Path) -> str:
    """Returns a file's suffix in lower case, without the suffix of a compression."""
    return (Path(path.stem).suffix if compression.suffix(path) else path.suffix).lower()


def detect_format(path: Path, json_key: str, is_named: bool) -> str | None:
    """Returns a file's format, one of FORMATS, from its name or else from its first bytes. None: the file is binary.

    A file is JSON lines if most of its first ten lines are JSON objects. A file with a single line that is a JSON
    object could also be the settings of a program, so there the object must have json_key.

    Args:
        is_named: the user named this file, so .json means JSON lines. Otherwise it was found in a folder.

    Raises:
        InputError: the file cannot be read, is damaged, or holds records in another form than JSON lines.
    """
    suffix = content_suffix(path)
    if implied := JSON_LINES if suffix == ".json" and is_named else FORMAT_OF_SUFFIX.get(suffix):
        return implied
    with _reading_errors(path), open_binary(path) as stream:
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
            f"{path}: begins like JSON, with a line of more than {JSON_START_BYTES >> 20} MiB; expected JSON lines or "
            "text: set --format, or leave the file out with --exclude"
        )
    objects = [_object(line) for line in islice(filter(bytes.strip, lines if is_whole else lines[:-1]), START_LINES)]
    if len(objects) == 1 and is_whole and objects[0] is not None:
        return JSON_LINES if is_named or json_key in objects[0] else TEXT
    num_objects = sum(json_object is not None for json_object in objects)
    if objects and 2 * num_objects + (objects[0] is not None) > len(objects):
        return JSON_LINES
    _refuse_other_records(path, start, json_key)
    return TEXT


def _object(line: bytes) -> dict | None:
    """Returns the JSON object in a line, or None."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        return DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None


def _refuse_other_records(path: Path, start: bytes, json_key: str) -> None:
    """Raises InputError if a file begins with a JSON object that has a text, or with an array of such objects."""
    text = start.decode(errors="replace").lstrip().removeprefix("[").lstrip()
    try:
        record, _ = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return
    if isinstance(record, dict) and isinstance(record.get(json_key), str):
        raise InputError(
            f"{path}: JSON with {json_key!r}, but most of its first lines are not JSON objects; expected one object "
            "per line: convert it, for example with `jq -c`, read it as text with --format text, or leave it out with "
            "--exclude"
        )


def num_row_groups(path: Path) -> int:
    """Returns the number of row groups in a Parquet file. Raises InputError if it cannot be read or is damaged."""
    with _reading_errors(path), _open_parquet(path) as file:
        return file.num_row_groups


def _lines_before(span: Span) -> int:
    """Returns the number of lines that begin before the span. Only messages need it."""
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
    one_object = "expected one object per line: fix the line, leave the file out, or read it as text with --format text"
    try:
        record = DECODER.decode(line.decode())
    except (ValueError, RecursionError) as error:
        raise _BadRecord(f"not JSON ({error})", one_object) from None
    if not isinstance(record, dict):
        raise _BadRecord(f"a JSON {type(record).__name__}", one_object)
    text = record.get(json_key)
    if not isinstance(text, str):
        if json_key in record:
            kind = "null" if text is None else type(text).__name__
            raise _BadRecord(f"{json_key!r} is {kind}", "expected a string: fix the line or set another --json-key")
        keys = ", ".join(map(repr, record))
        raise _BadRecord(f"no text under {json_key!r} (found: {keys})", "set the right key with --json-key")
    if b"\\u" in line and LONE_SURROGATE.search(text):
        raise _BadRecord(f"half a surrogate pair under {json_key!r}", "expected Unicode text: fix the line")
    return text


def _check_column(path: Path, schema: Any, json_key: str) -> None:
    pyarrow = require("pyarrow")
    if json_key not in schema.names:
        names = ", ".join(map(repr, schema.names))
        raise InputError(f"{path}: no column {json_key!r} (found: {names}); set the right column with --json-key")
    column = values = schema.field(json_key).type
    if pyarrow.types.is_dictionary(column):
        values = column.value_type
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    if values not in (*texts, pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()):
        raise InputError(
            f"{path}: column {json_key!r} holds {column}; expected strings: set the right column with --json-key"
        )


def _cell_text(value: Any, json_key: str) -> str:
    try:
        text = value.as_py()
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise _BadRecord(f"not UTF-8 ({error})", "expected text: fix the row or leave the file out") from None
    if text is None:
        problem = f"no text under {json_key!r} (found: null)"
        raise _BadRecord(problem, "expected a string: fix the row or leave the file out")
    return text


def _open_parquet(path: Path) -> Any:
    return require("pyarrow.parquet").ParquetFile(path, pre_buffer=False)


@contextmanager
def _reading_errors(path: Path) -> Iterator[None]:
    """Turns errors of reading `path` into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or ' '.join(str(error).split())}; expected a readable file: fix it or leave it "
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
        f"{path}: damaged ({' '.join(str(error).split())}); expected a complete file: copy it again or leave it out"
    )
