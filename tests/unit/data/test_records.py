"""Readers of all formats, for whole files and spans, and one-line error messages for every kind of damage."""

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megamtp.data import records, shards
from megamtp.data.input_files import find_source
from megamtp.data.records import JSON_LINES, PARQUET, Reader, Span, detect_format
from megamtp.data.records import TEXT as TEXT_FORMAT
from megamtp.errors import InputError

TEXTS = [f"text {number} \u2581\u00e9\r\n" * (number % 9) + "end" for number in range(1, 400)]
TEXT = "".join(TEXTS)
LINES = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def gz(content: bytes) -> bytes:
    """Compresses without a time stamp, so that test ids are the same in all pytest workers."""
    return gzip.compress(content, mtime=0)


def zst(content: bytes, frames: int = 1) -> bytes:
    compressor = zstandard.ZstdCompressor()
    bounds = [len(content) * frame // frames for frame in range(frames + 1)]
    return b"".join(compressor.compress(content[bounds[frame] : bounds[frame + 1]]) for frame in range(frames))


def parquet_bytes(column: pyarrow.Array, rows_per_group: int = 50, name: str = "text") -> bytes:
    stream = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(column))), name: column})
    parquet.write_table(table, stream, row_group_size=rows_per_group, compression="zstd")
    return stream.getvalue()


def read(path: Path, json_key: str = "text") -> list[tuple[str, str]]:
    return list(Reader(json_key).documents(Span("a", path, detect_format(path, json_key, is_named=True))))


def refusal(path: Path, json_key: str = "text") -> str:
    with pytest.raises(InputError) as error:
        read(path, json_key)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", LINES),
        (".jsonl", b"\xef\xbb\xbf" + LINES),
        (".jsonl.gz", gz(LINES)),
        (".jsonl.gz", gz(LINES[:999]) + gz(LINES[999:])),
        (".jsonl.bz2", bz2.compress(LINES)),
        (".NDJSON.BZ2", bz2.compress(LINES[:999]) + bz2.compress(LINES[999:])),
        (".jsonl.xz", lzma.compress(LINES)),
        (".jsonl.xz", lzma.compress(LINES[:999]) + bytes(8) + lzma.compress(LINES[999:]) + bytes(4)),
        (".ndjson", LINES),
        (".json", LINES),
        (".json.gz", gz(LINES)),
        (".part-00000", LINES),
        (".part-00000", b"\xef\xbb\xbf\n" + LINES),
        (".part-00000.gz", gz(LINES)),
        (".part-00000", parquet_bytes(pyarrow.array(TEXTS))),
        (".jsonl.zst", zst(LINES)),
        (".jsonl.zst", zst(LINES, frames=7)),
        (".parquet", parquet_bytes(pyarrow.array(TEXTS))),
        (".parquet", parquet_bytes(pyarrow.array(TEXTS, pyarrow.large_string()))),
        (".parquet", parquet_bytes(pyarrow.array([text.encode() for text in TEXTS]))),
        (".parquet", parquet_bytes(pyarrow.array(TEXTS).dictionary_encode())),
        (".parquet", parquet_bytes(pyarrow.array([text.encode() for text in TEXTS]).dictionary_encode())),
    ],
)
def test_every_format_yields_the_same_documents(tmp_path, suffix, content):
    path = tmp_path / f"some.file{suffix}"
    path.write_bytes(content)
    documents = read(path)
    assert [text for _, text in documents] == TEXTS
    assert len({name for name, _ in documents}) == len(TEXTS)
    assert [text for _, text in find_source([tmp_path]).documents()] == TEXTS


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".txt.gz", gz), (".md.zst", zst), (".pm.bz2", bz2.compress), (".TXT.XZ", lzma.compress)]
)
def test_compressed_text_is_one_document(tmp_path, suffix, compress):
    (tmp_path / f"a{suffix}").write_bytes(compress(TEXT.encode()))
    (tmp_path / f"b{suffix}").write_bytes(compress(b"caf\xe9"))
    source = find_source([tmp_path])
    reader = source.reader()
    assert list(source.documents(reader)) == [(f"a{suffix}", TEXT)]
    assert reader.not_utf8 == [f"b{suffix}"]


@pytest.mark.parametrize("size", [100, 3000, 10**6])
def test_row_groups_are_divided_among_shards(tmp_path, monkeypatch, size):
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", size)
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(pyarrow.array(["", *TEXTS])))
    planned = shards.cut_into_shards([Span("a", path, PARQUET)], False)
    assert len(planned) == {100: 8, 3000: path.stat().st_size // 3000, 10**6: 1}[size]
    assert sum(shard.num_bytes for shard in planned) == path.stat().st_size
    assert [document for shard in planned for document in shard.documents(Reader())] == read(path)
    documents = read(path)
    assert documents[0] == ("a/1", TEXTS[0])
    path.write_bytes(parquet_bytes(pyarrow.array(["", *TEXTS]).dictionary_encode()))
    planned = shards.cut_into_shards([Span("a", path, PARQUET)], False)
    assert [document for shard in planned for document in shard.documents(Reader())] == documents


DAMAGED = {
    "gz cut off": (".jsonl.gz", gz(LINES)[:-20], "damaged"),
    "gz of no content": (".jsonl.gz", b"", None),
    "gz that is none": (".jsonl.gz", LINES, "Not a gzipped file"),
    "gz with a wrong byte": (".txt.gz", gz(LINES)[:300] + b"?" + gz(LINES)[301:], "; expected"),
    "gz with a wrong checksum": (".jsonl.gz", gz(LINES)[:-8] + bytes(8), "CRC"),
    "zst cut off": (".jsonl.zst", zst(LINES)[:-20], "damaged (it ends within a frame)"),
    "zst cut off early": (".jsonl.zst", zst(LINES)[:3], "damaged (it ends within a frame)"),
    "zst cut off in its last frame": (".txt.zst", zst(LINES, 3)[:-1], "damaged (it ends within a frame)"),
    "zst that is none": (".txt.zst", LINES, "damaged"),
    "zst with garbage behind it": (".txt.zst", zst(LINES) + b"garbage", "damaged"),
    "bz2 cut off": (".jsonl.bz2", bz2.compress(LINES)[:-1], "damaged (it ends within a frame)"),
    "bz2 that is none": (".jsonl.bz2", LINES, "Invalid data stream"),
    "bz2 whose second stream is damaged": (
        ".jsonl.bz2",
        bz2.compress(LINES) + b"?" + bz2.compress(LINES),
        "Invalid data stream",
    ),
    "xz cut off": (".txt.xz", lzma.compress(LINES)[:-1], "damaged (it ends within a frame)"),
    "xz with a wrong byte": (".txt.xz", lzma.compress(LINES)[:300] + b"?" + lzma.compress(LINES)[301:], "damaged"),
    "xz whose second stream is damaged": (".txt.xz", lzma.compress(LINES) + b"?" + lzma.compress(LINES), "damaged"),
    "parquet cut off": (".parquet", parquet_bytes(pyarrow.array(TEXTS))[:-20], "damaged"),
    "parquet that is none": (".parquet", LINES, "damaged"),
    "empty parquet": (".parquet", b"", "damaged"),
    "parquet with wrong bytes": (
        ".parquet",
        b"PAR1" + bytes(5000) + parquet_bytes(pyarrow.array(TEXTS))[5004:],
        "; expected",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused(tmp_path, case):
    suffix, content, words = DAMAGED[case]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    if words is None:
        assert read(path) == []
        return
    message = refusal(path)
    assert message.startswith(f"{path}: ") and words in message, message
    assert "; expected a" in message


RECORDS = {
    "wrong column": (
        pyarrow.array(["a"]),
        "body",
        "no column 'body' (found: 'id', 'text'); set the right column with --json-key",
    ),
    "numbers": (pyarrow.array([1, 2]), "text", "column 'text' holds int64; expected strings"),
    "null in a dictionary": (
        pyarrow.array(["a", None]).dictionary_encode(),
        "text",
        "row 1: no text under 'text' (found: null)",
    ),
    "null": (pyarrow.array(["a"] * 60 + [None]), "text", "row 60: no text under 'text' (found: null)"),
    "bytes that are not UTF-8": (pyarrow.array([b"a", b"caf\xe9"]), "text", "row 1: not UTF-8 ("),
    "a string that is not UTF-8": (
        pyarrow.array([b"a", b"caf\xe9"]).view(pyarrow.string()),
        "text",
        "row 1: not UTF-8 (",
    ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_bad_row_is_refused(tmp_path, case):
    column, json_key, words = RECORDS[case]
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(column))
    assert words in refusal(path, json_key)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3000, 6000), (6000, None)])
def test_bad_line_of_a_span_is_reported_with_its_line_number_in_the_file(tmp_path, start, stop):
    lines = LINES.splitlines(keepends=True)
    bad = next(number for number in range(len(lines)) if sum(map(len, lines[:number])) >= start + 500)
    lines[bad] = b'{"text": "caf\xe9"}\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=rf"a\.jsonl:{bad + 1}: not JSON \('utf-8' codec can't decode byte 0xe9"):
        list(Reader().documents(Span("a", path, JSON_LINES, start, stop)))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".txt.zst", ".parquet"])
def test_file_that_cannot_be_read_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.symlink_to("/proc/self/mem")  # can be opened, but every read fails
    assert refusal(path).startswith(f"{path}: ")
    path.unlink()
    assert refusal(path).startswith(f"{path}: ")


@pytest.mark.parametrize(("suffix", "library"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")])
def test_missing_library_is_named(tmp_path, monkeypatch, suffix, library):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"content")
    for module in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    assert refusal(path) == f"{library} is not installed; expected it for this input: pip install {library}"


RECORD, SETTINGS = b'{"text": "a"}\n', b'{\n  "name": "a",\n  "text": 1\n}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("Module.PM", b"package Module;\n", TEXT_FORMAT),
        ("LICENSE", b"caf\xc3\xa9", TEXT_FORMAT),
        ("empty", b"", TEXT_FORMAT),
        ("latin", b"caf\xe9", TEXT_FORMAT),  # the reader detects that it is not UTF-8
        ("archive.tar", b"name" + bytes(100), None),
        ("wide", "text".encode("utf-16"), None),
        ("archive.tgz", gz(bytes(100)), None),
        ("archive.tar.gz", gz(b"name" + bytes(100)), None),
        ("rows", parquet_bytes(pyarrow.array(["a"])), PARQUET),
        ("rows.gz", gz(parquet_bytes(pyarrow.array(["a"]))), None),
        ("lines.ndjson", b"not JSON", JSON_LINES),
        ("lines.jsonl.xz", lzma.compress(b"not JSON"), JSON_LINES),
        ("part", RECORD * 2, JSON_LINES),
        ("part", b'\n \r\n{"body": 3}\r\n{}', JSON_LINES),
        ("part", RECORD + b"{damaged\n", JSON_LINES),
        ("part", b"{damaged\n" + RECORD * 2, JSON_LINES),
        ("part", b'{"name": "a"}\nprose\nprose\n', TEXT_FORMAT),
        ("part", b"As in:\n" + RECORD, TEXT_FORMAT),
        ("settings.json", SETTINGS, TEXT_FORMAT),
        ("settings.json", b'{"name": "a"}\n', TEXT_FORMAT),
        ("record.json", RECORD, JSON_LINES),
        ("numbers.json", b"[1,\n2]", TEXT_FORMAT),
        ("list.json", b'[{"name": "a"},\n{"name": "b"}]', TEXT_FORMAT),
        ("long", b"a long line " * 1000, TEXT_FORMAT),
        ("long", b'{"text": "' + b"a" * 1000 + b'"}\n' + RECORD, JSON_LINES),
        ("long", RECORD + b'{"text": "' + b"a" * 1000 + b'"}', JSON_LINES),
        ("deep", b'{"a":' * 100_000, TEXT_FORMAT),
    ],
)
def test_format_of_a_file_in_a_folder(tmp_path, monkeypatch, name, content, expected):
    monkeypatch.setattr(records, "START_BYTES", 400)
    (tmp_path / name).write_bytes(content)
    assert detect_format(tmp_path / name, "text", is_named=False) == expected


def test_json_file_that_the_user_named_is_json_lines(tmp_path):
    for name, content in (("a.json", SETTINGS), ("b.json", b'{"name": "a"}'), ("c", b'{"name": "a"}')):
        (tmp_path / name).write_bytes(content)
        assert detect_format(tmp_path / name, "text", is_named=True) == JSON_LINES


@pytest.mark.parametrize(
    "content",
    [
        b'[{"text": "a"}]',
        b'[\n {"text": "a",\n "id": 1},\n',
        b'{\n"id": 1,\n"text": "a"\n}\n{\n',
        RECORD + b"prose\nprose\n",
    ],
)
def test_json_records_in_another_form_are_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json: JSON with 'text', but most of its first .*--format text"):
        detect_format(path, "text", is_named=False)
    assert detect_format(path, "body", is_named=False) == TEXT_FORMAT


def test_json_with_a_very_long_first_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "START_BYTES", 400)
    monkeypatch.setattr(records, "JSON_START_BYTES", 1 << 20)
    path = tmp_path / "part"
    path.write_bytes(b'{"text": "' + b"a" * (1 << 21) + b'"}\n')
    with pytest.raises(InputError, match=r"begins like JSON, with a line of more than 1 MiB; .*--format.*--exclude"):
        detect_format(path, "text", is_named=True)


def test_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext \xef\xbb\xbf")
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf")
    assert read(tmp_path / "a.txt") == [("a", "text \ufeff")] and read(tmp_path / "empty.txt") == []


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, f"[{'9' * 5000}]", "9" * 5000 + ".5", "1e9999"])
def test_numbers_of_any_length_are_accepted_in_other_fields(tmp_path, number):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": {number}, "text": "a"}}\n')
    assert read(path) == [("a/0", "a")]
    path.write_text(f'{{"text": {"9" * 5000}}}\n')
    assert "'text' is int; expected a string" in refusal(path)


BAD_LINES = {
    b'{"text": null}': "'text' is null",
    b'{"text": 3}': "'text' is int",
    b'{"body": "a"}': "no text under 'text' (found: 'body')",
    b'{"text": "a\\ud800"}': "half a surrogate pair under 'text'",
    b'["text"]': "a JSON list",
    b'{"text": "a"': "not JSON (Expecting ',' delimiter: line 1 column 13 (char 12))",
    b'{"text": "caf\xe9"}': "not JSON ('utf-8' codec can't decode byte 0xe9 in position 13: unexpected end of data)",
}


@pytest.mark.parametrize("size", [50, 10**6])
def test_bad_records_are_skipped_and_listed(tmp_path, monkeypatch, size):
    """The list has their line numbers in the file, even if the file is divided among shards."""
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", size)
    good = LINES.splitlines()[: len(BAD_LINES)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for pair in zip(BAD_LINES, good, strict=True) for line in pair))
    reader = Reader(skip_bad_records=True)
    planned = shards.cut_into_shards([Span("a", path, JSON_LINES)], False)
    assert [text for shard in planned for _, text in shard.documents(reader)] == TEXTS[: len(BAD_LINES)]
    listed = [f"a:{2 * number + 1}: " for number in range(len(BAD_LINES))]
    assert all(map(str.startswith, reader.bad_records, listed)) and len(reader.bad_records) == len(listed)
    reasons = [record.partition(": ")[2] for record in reader.bad_records]
    assert [reason.partition(" (")[0] for reason in reasons] == [
        reason.partition(" (")[0] for reason in BAD_LINES.values()
    ]


def test_bad_rows_are_skipped_and_listed(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(pyarrow.array([b"a", None, b"caf\xe9", b"b"]).view(pyarrow.string())))
    reader = Reader(skip_bad_records=True)
    assert list(reader.documents(Span("a", path, PARQUET))) == [("a/0", "a"), ("a/3", "b")]
    assert [record[:10] for record in reader.bad_records] == ["a:row 1: n", "a:row 2: n"]
