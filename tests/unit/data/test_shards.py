"""Inputs cut into shards: their bounds by hand. test_records.py and test_workers.py read what they hold."""

import os

import pytest

from megamtp.data import shards
from megamtp.data.records import JSON_LINES, TEXT, Reader, Span
from megamtp.data.shards import plan
from megamtp.errors import InputError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 100)


def bounds(planned: list[shards.Shard]) -> list[list[tuple[str, int, int | None]]]:
    return [[(span.name, span.start, span.stop) for span in shard.spans] for shard in planned]


def test_small_files_share_a_shard_and_large_lines_are_cut(tmp_path):
    for name, size in (("a", 60), ("b", 50), ("c", 350), ("d", 10)):
        (tmp_path / name).write_bytes(b"x" * size)
    planned = plan([Span(name, tmp_path / name, JSON_LINES) for name in "abcd"], in_pieces=False)
    assert bounds(planned) == [
        [("a", 0, None), ("b", 0, None)],
        [("c", 0, 116)],
        [("c", 116, 233)],
        [("c", 233, 350)],
        [("d", 0, None)],
    ]
    assert [shard.num_bytes for shard in planned] == [110, 116, 117, 117, 10]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz"])
def test_texts_and_compressed_files_are_not_cut(tmp_path, name):
    (tmp_path / name).write_bytes(b"x" * 350)
    planned = plan([Span("a", tmp_path / name, TEXT if name == "a.txt" else JSON_LINES)], in_pieces=False)
    assert bounds(planned) == [[("a", 0, None)]]


def test_a_text_is_cut_where_its_pieces_end(tmp_path, monkeypatch):
    """Pieces of 64 bytes; its byte order mark is in none."""
    monkeypatch.setattr("megamtp.data.documents.PIECE_CHARACTERS", 64)
    text = ("x" * 63 + "\n") * 5
    (tmp_path / "a.txt").write_text(text, encoding="utf-8-sig")
    planned = plan([Span("a", tmp_path / "a.txt", TEXT)], in_pieces=True)
    assert bounds(planned) == [[("a", 3, 131)], [("a", 131, 259)], [("a", 259, 323)]]
    assert [shard.spans[0].first_piece for shard in planned] == [0, 2, 4]
    assert "".join(read for shard in planned for _, read in shard.documents(Reader())) == text


def test_a_fingerprint_changes_with_the_file_and_with_what_is_left_out(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 50)
    file = [Span("a", path, JSON_LINES)]
    (first,), (again,), (fewer,) = plan(file, False), plan(file, False), plan(file, False, [("a/0",)])
    assert first == again and fewer.fingerprint != first.fingerprint
    assert fewer.spans[0].skipped == ("a/0",)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    (later,) = plan(file, False)
    assert later.fingerprint != first.fingerprint and later.spans == first.spans


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone: No such file or directory; expected a readable file"):
        plan([Span("gone", tmp_path / "gone", TEXT)], False)
