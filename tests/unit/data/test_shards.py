"""The bounds of shards. test_records.py and test_workers.py test their content."""

import os

import pytest

from megamtp.data import shards
from megamtp.data.records import JSON_LINES, TEXT, Reader, Span
from megamtp.data.shards import cut_into_shards
from megamtp.errors import InputError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 100)


def bounds(all_shards: list[shards.Shard]) -> list[list[tuple[str, int, int | None]]]:
    return [[(span.name, span.start, span.stop) for span in shard.spans] for shard in all_shards]


def test_small_files_share_a_shard_and_large_lines_are_cut(tmp_path):
    for name, size in (("a", 60), ("b", 50), ("c", 350), ("d", 10)):
        (tmp_path / name).write_bytes(b"x" * size)
    all_shards = cut_into_shards([Span(name, tmp_path / name, JSON_LINES) for name in "abcd"], cuts_documents=False)
    assert bounds(all_shards) == [
        [("a", 0, None), ("b", 0, None)],
        [("c", 0, 116)],
        [("c", 116, 233)],
        [("c", 233, 350)],
        [("d", 0, None)],
    ]
    assert [shard.num_bytes for shard in all_shards] == [110, 116, 117, 117, 10]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz"])
def test_texts_and_compressed_files_are_not_cut(tmp_path, name):
    (tmp_path / name).write_bytes(b"x" * 350)
    all_shards = cut_into_shards(
        [Span("a", tmp_path / name, TEXT if name == "a.txt" else JSON_LINES)], cuts_documents=False
    )
    assert bounds(all_shards) == [[("a", 0, None)]]


def test_text_is_cut_where_its_pieces_end(tmp_path, monkeypatch):
    """Pieces have 64 bytes. The byte order mark belongs to no piece."""
    monkeypatch.setattr("megamtp.data.input_files.PIECE_CHARACTERS", 64)
    text = ("x" * 63 + "\n") * 5
    (tmp_path / "a.txt").write_text(text, encoding="utf-8-sig")
    all_shards = cut_into_shards([Span("a", tmp_path / "a.txt", TEXT)], cuts_documents=True)
    assert bounds(all_shards) == [[("a", 3, 131)], [("a", 131, 259)], [("a", 259, 323)]]
    assert [shard.spans[0].first_piece for shard in all_shards] == [0, 2, 4]
    assert "".join(read for shard in all_shards for _, read in shard.documents(Reader())) == text


def test_fingerprint_depends_on_the_file_and_on_skipped_documents(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 50)
    file = [Span("a", path, JSON_LINES)]
    (first,), (again,), (fewer,) = (
        cut_into_shards(file, False),
        cut_into_shards(file, False),
        cut_into_shards(file, False, [("a/0",)]),
    )
    assert first == again and fewer.fingerprint != first.fingerprint
    assert fewer.spans[0].skipped == ("a/0",)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    (later,) = cut_into_shards(file, False)
    assert later.fingerprint != first.fingerprint and later.spans == first.spans


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"gone: No such file or directory; expected a readable file"):
        cut_into_shards([Span("gone", tmp_path / "gone", TEXT)], False)
