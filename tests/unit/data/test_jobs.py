"""What is done with every shard: the key that names its part, and the tokenizer."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from megamtp.data.documents import find_source
from megamtp.data.jobs import TokenisationJob, make_job
from megamtp.data.shards import Shard, plan
from megamtp.errors import InputError

JOB = TokenisationJob(
    Path("work"), "bytes", "digest", "text", seed=0, in_pieces=False, with_text_hashes=False, skip_bad_records=False
)


def shard(fingerprint: str = "fingerprint") -> Shard:
    return Shard((), 100, fingerprint)


@pytest.mark.parametrize(
    "change",
    [{"tokenizer_digest": "other"}, {"json_key": "body"}, {"seed": 1}, {"in_pieces": True}, {"with_text_hashes": True}],
)
def test_a_part_has_another_key_for_every_setting_that_changes_it(change):
    assert dataclasses.replace(JOB, **change).key(shard()) != JOB.key(shard())
    assert JOB.key(shard("other")) != JOB.key(shard())


def test_a_part_keeps_its_key_where_it_is_the_same():
    """Another folder, the same tokenizer elsewhere, and bad records, of which a part that is kept has none."""
    same = {"folder": Path("elsewhere"), "tokenizer": "copy.model", "skip_bad_records": True}
    assert dataclasses.replace(JOB, **same).key(shard()) == JOB.key(shard())


def made(texts: dict[str, str], folder: Path, in_pieces: bool = False, **options) -> TokenisationJob:
    for name, text in texts.items():
        (folder / name).write_text(text)
    source = find_source([folder / name for name in texts])
    work = folder / "work"
    work.mkdir(exist_ok=True)
    settings = {"vocab_size": None, "tokenizer": "bytes", "seed": 0, "deduplicate": True} | options
    return make_job(source, plan(source.files, in_pieces), in_pieces, work, **settings)


def test_bytes_need_no_model(tmp_path):
    found = made({"a.txt": "a", "b.txt": "b"}, tmp_path)
    assert (found.tokenizer, found.tokenizer_digest, found.with_text_hashes) == ("bytes", "bytes", True)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_given_model_is_copied(tmp_path):
    (tmp_path / "some.model").write_bytes(b"a model")
    found = made({"a.txt": "a", "b.txt": "b"}, tmp_path, tokenizer=tmp_path / "some.model", deduplicate=False)
    assert Path(found.tokenizer).read_bytes() == b"a model" and Path(found.tokenizer).parent == tmp_path / "work"
    assert found.tokenizer_digest == hashlib.sha256(b"a model").hexdigest() and not found.with_text_hashes


def test_a_model_is_trained_once_for_equal_inputs(tmp_path):
    texts = {f"{number}.txt": f"some text {number} of words\n" * 50 for number in range(3)}
    first = made(texts, tmp_path, tokenizer=None, vocab_size=280)
    trained = Path(first.tokenizer).stat().st_mtime_ns
    source = find_source([tmp_path / name for name in texts])
    again = make_job(source, plan(source.files, False), False, tmp_path / "work", 280, None, 0, False)
    assert again.tokenizer == first.tokenizer and Path(again.tokenizer).stat().st_mtime_ns == trained
    other = make_job(source, plan(source.files, False), False, tmp_path / "work", 281, None, 0, False)
    assert other.tokenizer != first.tokenizer


def test_one_short_document_is_too_few_to_be_split(tmp_path):
    with pytest.raises(InputError, match=r"found 1 documents that differ in name in .*a\.txt; expected at least two"):
        made({"a.txt": "short"}, tmp_path, in_pieces=True)
