"""Documents of each kind of file, whole or in spans, and each kind of damage in one line that names the place."""

import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megamtp.data import shards
from megamtp.data.documents import find_source
from megamtp.data.records import Span, read
from megamtp.errors import InputError

TEXTS = [f"text {number} \u2581\u00e9\r\n" * (number % 9) + "end" for number in range(1, 400)]
LINES = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def zst(content: bytes, frames: int = 1) -> bytes:
    compressor = zstandard.ZstdCompressor()
    bounds = [len(content) * frame // frames for frame in range(frames + 1)]
    return b"".join(compressor.compress(content[bounds[frame] : bounds[frame + 1]]) for frame in range(frames))


def parquet_bytes(column: pyarrow.Array, rows_a_group: int = 50, name: str = "text") -> bytes:
    stream = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(column))), name: column})
    parquet.write_table(table, stream, row_group_size=rows_a_group, compression="zstd")
    return stream.getvalue()


def found(path: Path, json_key: str = "text") -> list[tuple[str, str]]:
    return list(read(Span("a", path), json_key, []))


def refusal(path: Path, json_key: str = "text") -> str:
    with pytest.raises(InputError) as error:
        found(path, json_key)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", LINES),
        (".jsonl", b"\xef\xbb\xbf" + LINES),
        (".jsonl.gz", gzip.compress(LINES)),
        (".jsonl.gz", gzip.compress(LINES[:999]) + gzip.compress(LINES[999:])),
        (".json.gz", gzip.compress(LINES)),
        (".jsonl.zst", zst(LINES)),
        (".jsonl.zst", zst(LINES, frames=7)),
        (".parquet", parquet_bytes(pyarrow.array(TEXTS))),
        (".parquet", parquet_bytes(pyarrow.array(TEXTS, pyarrow.large_string()))),
        (".parquet", parquet_bytes(pyarrow.array([text.encode() for text in TEXTS]))),
    ],
)
def test_the_same_documents_from_every_kind_of_file(tmp_path, suffix, content):
    path = tmp_path / f"some.file{suffix}"
    path.write_bytes(content)
    documents = found(path)
    assert [text for _, text in documents] == TEXTS
    assert len({name for name, _ in documents}) == len(TEXTS)
    assert [text for _, text in find_source([tmp_path]).documents()] == TEXTS


@pytest.mark.parametrize(("suffix", "compress"), [(".txt.gz", gzip.compress), (".md.zst", zst)])
def test_compressed_text_is_one_document(tmp_path, suffix, compress):
    (tmp_path / f"a{suffix}").write_bytes(compress(LINES))
    (tmp_path / f"b{suffix}").write_bytes(compress(b"caf\xe9"))
    source = find_source([tmp_path])
    assert list(source.documents()) == [(f"a{suffix}", LINES.decode())]
    assert source.unreadable == [f"b{suffix}"]


@pytest.mark.parametrize("size", [100, 3000, 10**6])
def test_row_groups_in_shards(tmp_path, monkeypatch, size):
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", size)
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(pyarrow.array(["", *TEXTS])))
    planned = shards.plan([("a", path)], False)
    assert len(planned) == {100: 8, 3000: path.stat().st_size // 3000, 10**6: 1}[size]
    assert sum(shard.num_bytes for shard in planned) == path.stat().st_size
    assert [document for shard in planned for document in shard.documents("text", [])] == found(path)
    assert found(path)[0] == ("a/1", TEXTS[0])


DAMAGED = {
    "gz cut off": (".jsonl.gz", gzip.compress(LINES)[:-20], "damaged"),
    "gz of no content": (".jsonl.gz", b"", None),
    "gz that is none": (".jsonl.gz", LINES, "Not a gzipped file"),
    "gz with a wrong byte": (".txt.gz", gzip.compress(LINES)[:300] + b"?" + gzip.compress(LINES)[301:], "; expected"),
    "gz with a wrong checksum": (".jsonl.gz", gzip.compress(LINES)[:-8] + bytes(8), "CRC"),
    "zst cut off": (".jsonl.zst", zst(LINES)[:-20], "damaged (it ends within a frame)"),
    "zst cut off early": (".jsonl.zst", zst(LINES)[:3], "damaged (it ends within a frame)"),
    "zst cut off in its last frame": (".txt.zst", zst(LINES, 3)[:-1], "damaged (it ends within a frame)"),
    "zst that is none": (".txt.zst", LINES, "damaged"),
    "zst with garbage behind it": (".txt.zst", zst(LINES) + b"garbage", "damaged"),
    "parquet cut off": (".parquet", parquet_bytes(pyarrow.array(TEXTS))[:-20], "damaged"),
    "parquet that is none": (".parquet", LINES, "damaged"),
    "empty parquet": (".parquet", b"", "damaged"),
    "parquet with wrong bytes": (".parquet", b"PAR1" + bytes(5000) + parquet_bytes(pyarrow.array(TEXTS))[5004:], "; expected"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_named(tmp_path, case):
    suffix, content, words = DAMAGED[case]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    if words is None:
        assert found(path) == []
        return
    message = refusal(path)
    assert message.startswith(f"{path}: ") and words in message, message
    assert "; expected a" in message


RECORDS = {
    "wrong column": (pyarrow.array(["a"]), "body", "no column 'body' (found: 'id', 'text'); give the right one with --json-key"),
    "numbers": (pyarrow.array([1, 2]), "text", "column 'text' holds int64, expected strings"),
    "null": (pyarrow.array(["a"] * 60 + [None]), "text", "row 60: no text under 'text' (found: null)"),
    "bytes that are not UTF-8": (pyarrow.array([b"a", b"caf\xe9"]), "text", "row 1: not UTF-8 ("),
    "a string that is not UTF-8": (pyarrow.array([b"a", b"caf\xe9"]).view(pyarrow.string()), "text", "row 1: not UTF-8 ("),
}


@pytest.mark.parametrize("case", RECORDS)
def test_bad_row_is_named(tmp_path, case):
    column, json_key, words = RECORDS[case]
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(column))
    assert words in refusal(path, json_key)


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3000, 6000), (6000, None)])
def test_bad_line_of_a_span_has_its_number_in_the_file(tmp_path, start, stop):
    lines = LINES.splitlines(keepends=True)
    bad = next(number for number in range(len(lines)) if sum(map(len, lines[:number])) >= start + 500)
    lines[bad] = b'{"text": "caf\xe9"}\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=rf"a\.jsonl:{bad + 1}: not JSON \('utf-8' codec can't decode byte 0xe9"):
        list(read(Span("a", path, start, stop), "text", []))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".txt.zst", ".parquet"])
def test_file_that_cannot_be_read_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.symlink_to("/proc/self/mem")  # opens, and every read fails
    assert refusal(path).startswith(f"{path}: ")
    path.unlink()
    assert refusal(path).startswith(f"{path}: ")


@pytest.mark.parametrize(("suffix", "library"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")])
def test_missing_library_is_named(tmp_path, monkeypatch, suffix, library):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    for module in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    assert refusal(path) == f"{library} is not installed, expected for this input; run: pip install {library}"
