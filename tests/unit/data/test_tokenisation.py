"""The settings of tokenisation: keys of tokenised shards, and the choice of the tokenizer."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from megamtp.data.input_files import find_source
from megamtp.data.shards import Shard, cut_into_shards
from megamtp.data.tokenisation import TokenisationTask, make_task
from megamtp.errors import InputError

TASK = TokenisationTask(
    Path("work"),
    "bytes",
    "digest",
    "text",
    seed=0,
    cuts_documents=False,
    with_text_hashes=False,
    skip_bad_records=False,
)


def shard(fingerprint: str = "fingerprint") -> Shard:
    return Shard((), 100, fingerprint)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_digest": "other"},
        {"json_key": "body"},
        {"seed": 1},
        {"cuts_documents": True},
        {"with_text_hashes": True},
    ],
)
def test_key_depends_on_the_settings_and_the_inputs(change):
    assert dataclasses.replace(TASK, **change).key(shard()) != TASK.key(shard())
    assert TASK.key(shard("other")) != TASK.key(shard())


def test_key_does_not_depend_on_other_settings():
    """These are the folder, the tokenizer's path, and skip_bad_records, which only matters for bad records."""
    same = {"folder": Path("elsewhere"), "tokenizer": "copy.model", "skip_bad_records": True}
    assert dataclasses.replace(TASK, **same).key(shard()) == TASK.key(shard())


def task_of(texts: dict[str, str], folder: Path, cuts_documents: bool = False, **options) -> TokenisationTask:
    for name, text in texts.items():
        (folder / name).write_text(text)
    source = find_source([folder / name for name in texts])
    work = folder / "work"
    work.mkdir(exist_ok=True)
    settings = {"vocab_size": None, "tokenizer": "bytes", "seed": 0, "deduplicate": True} | options
    return make_task(source, cut_into_shards(source.files, cuts_documents), cuts_documents, work, **settings)


def test_byte_tokenizer_needs_no_model(tmp_path):
    task = task_of({"a.txt": "a", "b.txt": "b"}, tmp_path)
    assert (task.tokenizer, task.tokenizer_digest, task.with_text_hashes) == ("bytes", "bytes", True)
    assert list((tmp_path / "work").iterdir()) == []


def test_given_model_is_copied(tmp_path):
    (tmp_path / "some.model").write_bytes(b"a model")
    task = task_of({"a.txt": "a", "b.txt": "b"}, tmp_path, tokenizer=tmp_path / "some.model", deduplicate=False)
    assert Path(task.tokenizer).read_bytes() == b"a model" and Path(task.tokenizer).parent == tmp_path / "work"
    assert task.tokenizer_digest == hashlib.sha256(b"a model").hexdigest() and not task.with_text_hashes


def test_model_is_trained_only_once_for_equal_inputs(tmp_path):
    texts = {f"{number}.txt": f"some text {number} of words\n" * 50 for number in range(3)}
    first = task_of(texts, tmp_path, tokenizer=None, vocab_size=280)
    trained = Path(first.tokenizer).stat().st_mtime_ns
    source = find_source([tmp_path / name for name in texts])
    again = make_task(source, cut_into_shards(source.files, False), False, tmp_path / "work", 280, None, 0, False)
    assert again.tokenizer == first.tokenizer and Path(again.tokenizer).stat().st_mtime_ns == trained
    other = make_task(source, cut_into_shards(source.files, False), False, tmp_path / "work", 281, None, 0, False)
    assert other.tokenizer != first.tokenizer


def test_single_short_document_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"found 1 documents with different names in .*a\.txt; expected at least two"):
        task_of({"a.txt": "short"}, tmp_path, cuts_documents=True)
