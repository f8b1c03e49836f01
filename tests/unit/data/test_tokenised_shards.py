"""Tokenised shards: the tokens and the document tables of hand-written inputs."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megamtp.data import tokenised_shards
from megamtp.data.records import JSON_LINES, TEXT, Span
from megamtp.data.shards import Shard
from megamtp.data.tokenisation import TokenisationTask
from megamtp.data.tokenised_shards import is_tokenised, open_tokenised_shard, split_hash, tokenise
from megamtp.errors import InputError

END = 256  # the byte tokenizer's end-of-document id


def make_task(folder: Path, **settings) -> TokenisationTask:
    options = {"seed": 3, "cuts_documents": False, "with_text_hashes": True} | settings
    return TokenisationTask(folder, "bytes", "bytes", "text", **options)


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
    assert not is_tokenised(whole, make_task(tmp_path))
    assert tokenise(whole, make_task(tmp_path)) == 123
    assert is_tokenised(whole, make_task(tmp_path))
    tokenised = open_tokenised_shard(whole, make_task(tmp_path), np.dtype(np.uint16))
    assert tokenised.tokens.tolist() == [*b"ab", END, *b"<|end|>", END, *"\u00e9".encode(), END]
    assert tokenised.documents["length"].tolist() == [3, 8, 3]
    assert tokenised.documents["bytes"].tolist() == [2, 7, 2]
    assert tokenised.documents["end_marker"].tolist() == [False, True, False]
    assert tokenised.documents["name_hash"].tolist() == [split_hash(3, name) for name in ("a", "c/0", "c/20")]
    digest = hashlib.blake2b(b"ab", digest_size=16).digest()
    first = tokenised.documents[0]
    assert (int(first["text_high"]), int(first["text_low"])) == (
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:], "little"),
    )
    assert (tokenised.not_utf8, tokenised.bad_records) == (["b"], [])


def test_skipped_documents_and_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("megamtp.data.input_files.PIECE_CHARACTERS", 4)
    (tmp_path / "a.txt").write_text("abc\ndef\n")
    whole = shard(Span("a", tmp_path / "a.txt", TEXT), Span("b", tmp_path / "a.txt", TEXT, skipped=("b",)))
    pieces_task = make_task(tmp_path, cuts_documents=True, with_text_hashes=False)
    tokenise(whole, pieces_task)
    tokenised = open_tokenised_shard(whole, pieces_task, np.dtype(np.uint16))
    assert tokenised.tokens.tolist() == [*b"abc\n", END, *b"def\n", END]
    assert tokenised.documents["name_hash"].tolist() == [split_hash(3, name) for name in ("a/0", "a/1")]
    assert not tokenised.documents["text_high"].any()


def test_shard_without_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    empty = shard(Span("a", tmp_path / "a.txt", TEXT))
    tokenise(empty, make_task(tmp_path))
    tokenised = open_tokenised_shard(empty, make_task(tmp_path), np.dtype(np.uint16))
    assert (len(tokenised.tokens), len(tokenised.documents), tokenised.not_utf8) == (0, 0, ["a"])


def test_shard_with_bad_records_is_reused_only_if_they_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n')
    bad = shard(Span("a", tmp_path / "a.jsonl", JSON_LINES))
    with pytest.raises(InputError, match=r"a\.jsonl:1: 'text' is null"):
        tokenise(bad, make_task(tmp_path))
    lenient = make_task(tmp_path, skip_bad_records=True)
    tokenise(bad, lenient)
    assert is_tokenised(bad, lenient) and not is_tokenised(bad, make_task(tmp_path))
    assert open_tokenised_shard(bad, lenient, np.dtype(np.uint16)).bad_records == ["a:1: 'text' is null"]


def test_document_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenised_shards, "LONGEST_SEQUENCE", 3)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(InputError, match=r"^a: 4 tokens; expected at most 3 in a document: split"):
        tokenise(shard(Span("a", tmp_path / "a.txt", TEXT)), make_task(tmp_path))


def test_split_hash():
    assert split_hash(3, "a") == int(hashlib.sha256(b"3/a").hexdigest()[:16], 16)
