"""One shard's tokens and its table of documents, by hand."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megamtp.data import parts
from megamtp.data.jobs import TokenisationJob
from megamtp.data.parts import is_finished, open_part, split_hash, tokenise
from megamtp.data.records import JSON_LINES, TEXT, Span
from megamtp.data.shards import Shard
from megamtp.errors import InputError

END = 256  # of a document of bytes


def job(folder: Path, **settings) -> TokenisationJob:
    options = {"seed": 3, "in_pieces": False, "with_text_hashes": True} | settings
    return TokenisationJob(folder, "bytes", "bytes", "text", **options)


def shard(*spans: Span) -> Shard:
    return Shard(spans, 123, "fingerprint")


def test_tokens_and_documents_of_a_shard(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.jsonl").write_text('{"text": "<|end|>"}\n{"text": "\u00e9"}\n')
    whole = shard(
        Span("a", tmp_path / "a.txt", TEXT),
        Span("b", tmp_path / "b.txt", TEXT),
        Span("c", tmp_path / "c.jsonl", JSON_LINES, skipped=("c/none",)),
    )
    assert not is_finished(whole, job(tmp_path))
    assert tokenise(whole, job(tmp_path)) == 123
    assert is_finished(whole, job(tmp_path))
    found = open_part(whole, job(tmp_path), np.dtype(np.uint16))
    assert found.tokens.tolist() == [*b"ab", END, *b"<|end|>", END, *"\u00e9".encode(), END]
    assert found.documents["length"].tolist() == [3, 8, 3]
    assert found.documents["bytes"].tolist() == [2, 7, 2]
    assert found.documents["end_marker"].tolist() == [False, True, False]
    assert found.documents["name"].tolist() == [split_hash(3, name) for name in ("a", "c/0", "c/20")]
    digest = hashlib.blake2b(b"ab", digest_size=16).digest()
    first = found.documents[0]
    assert (int(first["text_high"]), int(first["text_low"])) == (
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:], "little"),
    )
    assert (found.not_utf8, found.bad_records) == (["b"], [])


def test_a_document_that_is_left_out_and_pieces_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("megamtp.data.documents.PIECE_CHARACTERS", 4)
    (tmp_path / "a.txt").write_text("abc\ndef\n")
    whole = shard(Span("a", tmp_path / "a.txt", TEXT), Span("b", tmp_path / "a.txt", TEXT, skipped=("b",)))
    in_pieces = job(tmp_path, in_pieces=True, with_text_hashes=False)
    tokenise(whole, in_pieces)
    found = open_part(whole, in_pieces, np.dtype(np.uint16))
    assert found.tokens.tolist() == [*b"abc\n", END, *b"def\n", END]
    assert found.documents["name"].tolist() == [split_hash(3, name) for name in ("a/0", "a/1")]
    assert not found.documents["text_high"].any()


def test_a_shard_without_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    empty = shard(Span("a", tmp_path / "a.txt", TEXT))
    tokenise(empty, job(tmp_path))
    found = open_part(empty, job(tmp_path), np.dtype(np.uint16))
    assert (len(found.tokens), len(found.documents), found.not_utf8) == (0, 0, ["a"])


def test_a_part_with_bad_records_is_finished_only_where_they_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    bad = shard(Span("a", tmp_path / "a.jsonl", JSON_LINES))
    with pytest.raises(InputError, match=r"a\.jsonl:1: 'text' is null"):
        tokenise(bad, job(tmp_path))
    lenient = job(tmp_path, skip_bad_records=True)
    tokenise(bad, lenient)
    assert is_finished(bad, lenient) and not is_finished(bad, job(tmp_path))
    assert open_part(bad, lenient, np.dtype(np.uint16)).bad_records == ["a:1: 'text' is null"]


def test_a_document_that_no_index_can_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LONGEST_SEQUENCE", 3)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(InputError, match=r"^a: 4 tokens, expected at most 3 in a document: cut it"):
        tokenise(shard(Span("a", tmp_path / "a.txt", TEXT)), job(tmp_path))


def test_the_hash_that_decides_the_split():
    assert split_hash(3, "a") == int(hashlib.sha256(b"3/a").hexdigest()[:16], 16)
