"""Prepared corpora: their content, when they are reused or refused, and interrupted preparations."""

import errno
import fcntl
import json
import math
import os
import shutil
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from megamtp.data import corpus as corpus_module
from megamtp.data.corpus import prepare, read_corpus
from megamtp.data.indexed_dataset import IndexedDataset
from megamtp.data.input_files import Source, find_source
from megamtp.data.tokenizer import SentencePieceTokenizer
from megamtp.errors import InputError

VOCAB_SIZE = 300
SPLITS = ("train", "validation")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Skips drawing, which takes longer than everything else and is tested in test_length_report.py."""
    monkeypatch.setattr(corpus_module, "draw_lengths", lambda lengths: bytes(lengths))


@pytest.fixture
def source(tmp_path) -> Source:
    """Writes 50 documents, and one file that is not UTF-8."""
    (tmp_path / "texts").mkdir()
    for number in range(50):
        text = "".join(f"def f{line}(x):\r\n\treturn x * {number}  \u2581\n" for line in range(number % 7 + 1))
        (tmp_path / f"texts/{number:02}.py").write_bytes(text.encode())
    (tmp_path / "texts/latin.txt").write_bytes(b"caf\xe9")
    return find_source([tmp_path / "texts"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def split_texts(folder: Path, split: str) -> list[str]:
    """Returns the texts of a split's documents, and checks that each ends with the end-of-document id."""
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    documents = list(IndexedDataset(folder / split))
    assert all(tokens[-1] == tokenizer.end_of_document_id for tokens in documents)
    return [tokenizer.decode(tokens[:-1]) for tokens in documents]


def refusal(*arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        prepare(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_content_of_a_corpus(source, tmp_path):
    corpus, reused = prepare(source, tmp_path / "out", VOCAB_SIZE, validation_fraction=0.1)
    texts = [text for _, text in source.documents()]
    train, validation = (split_texts(tmp_path / "out", split) for split in SPLITS)
    assert not reused
    assert sorted(train + validation) == sorted(texts)
    assert [text for text in texts if text not in validation] == train  # in the order of the inputs
    assert corpus.documents == {"train": 45, "validation": 5} == {"train": len(train), "validation": len(validation)}
    assert corpus.tokens == {split: IndexedDataset(tmp_path / "out" / split).num_tokens for split in SPLITS}
    assert corpus.bytes_per_token == sum(len(text.encode()) for text in texts) / sum(corpus.tokens.values())
    assert (corpus.vocab_size, corpus.unreadable_files) == (VOCAB_SIZE, ["latin.txt"])
    assert read_corpus(tmp_path / "out") == corpus
    ends = [f"{split}{end}" for split in SPLITS for end in (".bin", ".idx", ".crc")]
    assert sorted(contents(tmp_path / "out")) == sorted(["corpus.json", "lengths.png", "tokenizer.model", *ends])


def test_unigram_entropy(source, tmp_path):
    corpus, _ = prepare(source, tmp_path / "out", VOCAB_SIZE)
    counts = Counter(token for tokens in IndexedDataset(tmp_path / "out/validation") for token in tokens.tolist())
    total = sum(counts.values())
    expected = -sum(number / total * math.log(number / total) for number in counts.values())
    assert corpus.unigram_entropy == pytest.approx(expected, rel=1e-12)


def test_existing_corpus_is_reused(source, tmp_path):
    first, _ = prepare(source, tmp_path / "out", VOCAB_SIZE)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second, reused = prepare(find_source([tmp_path / "texts"]), tmp_path / "out", VOCAB_SIZE)
    assert reused
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "change", ["vocab_size", "validation_fraction", "seed", "tokenizer", "json_key", "text", "file"]
)
def test_other_inputs_or_settings_are_refused_without_overwrite(source, tmp_path, change):
    out, options = tmp_path / "out", {"vocab_size": VOCAB_SIZE, "validation_fraction": 0.02, "seed": 0}
    prepare(source, out, **options)
    before = contents(out)
    if change == "text":
        (tmp_path / "texts/00.py").write_text("another text")
    elif change == "file":
        (tmp_path / "texts/99.py").write_text("another file")
    elif change == "tokenizer":
        options["tokenizer"] = out / "tokenizer.model"
    elif change != "json_key":
        options[change] = {"vocab_size": 301, "validation_fraction": 0.5, "seed": 1}[change]
    source = find_source([tmp_path / "texts"], json_key="body" if change == "json_key" else "text")
    assert f"{out} holds a corpus of other inputs or settings" in refusal(source, out, **options)
    assert contents(out) == before
    _, reused = prepare(source, out, **options, overwrite=True)
    prepare(source, tmp_path / "fresh", **options)
    assert not reused
    assert contents(out) == contents(tmp_path / "fresh")


def interrupted_at(monkeypatch, call: int, *arguments, **options) -> bool:
    """Prepares a corpus and interrupts it at a call of os.replace. Returns False if there are fewer calls."""
    replace, calls = os.replace, []

    def interrupt(*paths):
        if len(calls) == call:
            raise KeyboardInterrupt
        calls.append(paths)
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        try:
            prepare(*arguments, **options)
        except KeyboardInterrupt:
            return True
    return False


def test_corpus_of_an_earlier_version_is_read_and_reused(source, tmp_path):
    """In earlier versions, corpus.json has no files, passed_over and skipped_records."""
    prepare(source, tmp_path / "out", VOCAB_SIZE)
    summary = json.loads((tmp_path / "out/corpus.json").read_text())
    for name in ("files", "passed_over", "skipped_records"):
        del summary[name]
    (tmp_path / "out/corpus.json").write_text(json.dumps(summary))
    corpus, reused = prepare(source, tmp_path / "out", VOCAB_SIZE)
    assert reused and (corpus.files, corpus.passed_over, corpus.skipped_records) == ({}, {}, 0)


@pytest.mark.parametrize("change", [{"file_format": "text"}, {"skip_bad_records": True}])
def test_other_settings_for_the_same_files_make_another_corpus(tmp_path, change):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "line {number}"}}\n' for number in range(50)))
    prepare(find_source([tmp_path / "a.jsonl"]), tmp_path / "out", tokenizer="bytes")
    assert "other inputs or settings" in refusal(
        find_source([tmp_path / "a.jsonl"], **change), tmp_path / "out", tokenizer="bytes"
    )


def test_interrupted_preparation_is_not_a_corpus_and_can_be_restarted(source, tmp_path, monkeypatch):
    prepare(source, tmp_path / "whole", VOCAB_SIZE)
    whole = contents(tmp_path / "whole")
    for call in count():
        out = tmp_path / str(call)
        if not interrupted_at(monkeypatch, call, source, out, VOCAB_SIZE):
            break
        assert "corpus.json" not in contents(out)
        with pytest.raises(InputError, match=r"corpus\.json cannot be read"):
            read_corpus(out)
        prepare(source, out, VOCAB_SIZE)
        assert {name: contents(out).get(name) for name in whole} == whole
    assert call >= len(whole)


def test_interrupted_replacement_leaves_the_old_corpus_or_none(source, tmp_path, monkeypatch):
    prepare(source, tmp_path / "old", VOCAB_SIZE)
    old = contents(tmp_path / "old")
    for call in count():
        out = tmp_path / str(call)
        prepare(source, out, VOCAB_SIZE)
        if not interrupted_at(monkeypatch, call, source, out, VOCAB_SIZE + 1, overwrite=True):
            break
        left = contents(out)
        assert "corpus.json" not in left or {name: left[name] for name in old} == old
    assert call >= len(old)


def test_split_depends_on_the_seed_and_not_on_the_order(source, tmp_path):
    validation = []
    for number, (files, seed) in enumerate([(source.files, 0), (source.files[::-1], 0), (source.files, 1)]):
        prepare(Source(files), tmp_path / str(number), VOCAB_SIZE, validation_fraction=0.3, seed=seed)
        validation.append(split_texts(tmp_path / str(number), "validation"))
    first, reversed_order, other_seed = validation
    assert first == reversed_order[::-1]
    assert len(first) == len(other_seed) == 15
    assert set(first) != set(other_seed)


@pytest.mark.parametrize(("fraction", "expected"), [(1e-9, 1), (0.5, 25), (0.999999, 49)])
def test_neither_split_is_empty(source, tmp_path, fraction, expected):
    corpus, _ = prepare(source, tmp_path / "out", VOCAB_SIZE, validation_fraction=fraction)
    assert corpus.documents == {"train": 50 - expected, "validation": expected}


def test_documents_with_the_same_name_are_in_the_same_split(tmp_path):
    inputs = [tmp_path / "a", tmp_path / "b"]
    for folder in inputs:
        folder.mkdir()
        (folder / "x.txt").write_text(f"the text of {folder.name} " * 20)
    assert "found 1 documents with different names" in refusal(find_source(inputs), tmp_path / "out", 275)
    (tmp_path / "a/y.txt").write_text("one more")
    corpus, _ = prepare(find_source(inputs), tmp_path / "out", 275)
    assert sorted(corpus.documents.values()) == [1, 2]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"too short to be cut"])
def test_too_little_text_is_refused_and_leaves_no_files(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    message = refusal(find_source([tmp_path / "a.txt"]), tmp_path / "out", VOCAB_SIZE)
    assert message.startswith(f"found {int(content[:1] == b't')} documents")
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "train.bin", "validation.idx", "train.crc", "lengths.png", "corpus.json"]
)
def test_full_disk(source, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{name}.partial").symlink_to("/dev/full")
    message = refusal(source, out, VOCAB_SIZE)
    assert message == f"{out} cannot be written to: No space left on device; choose another folder or make room"
    assert not (out / "corpus.json").exists()
    (out / f"{name}.partial").unlink(missing_ok=True)
    assert not prepare(source, out, VOCAB_SIZE)[1]
    assert prepare(source, out, VOCAB_SIZE)[1]
    assert not (out / ".preparation").exists()


@pytest.mark.parametrize(
    "wrong", [{"vocab_size": 3}, {"vocab_size": 10**6}, {"tokenizer": "texts/00.py"}, {"tokenizer": "none"}]
)
def test_wrong_options_leave_no_files_and_do_not_touch_an_old_corpus(source, tmp_path, wrong):
    options = {name: tmp_path / value if name == "tokenizer" else value for name, value in wrong.items()}
    (tmp_path / "out").mkdir()
    refusal(source, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == {}
    prepare(source, tmp_path / "out", VOCAB_SIZE)
    before = contents(tmp_path / "out")
    refusal(source, tmp_path / "out", **options, overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"vocab_size": 3}', b"\xff"])
def test_damaged_summary_is_refused_and_can_be_overwritten(source, tmp_path, content):
    corpus, _ = prepare(source, tmp_path / "out", VOCAB_SIZE)
    (tmp_path / "out/corpus.json").write_bytes(content)
    message = refusal(source, tmp_path / "out", VOCAB_SIZE)
    assert message.startswith(f"{tmp_path}/out/corpus.json cannot be read (")
    assert message.endswith("prepare the corpus again, with --overwrite")
    assert prepare(source, tmp_path / "out", VOCAB_SIZE, overwrite=True) == (corpus, False)


def test_input_that_changes_during_the_preparation_is_refused(source, tmp_path, monkeypatch):
    """The corpus would mix old and new content. The next preparation reads the input again."""
    split_threshold = corpus_module.split_threshold

    def change(*arguments):
        (tmp_path / "texts/00.py").write_text("another text")
        return split_threshold(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "split_threshold", change)
        message = refusal(source, tmp_path / "out", VOCAB_SIZE)
    assert message == (
        "an input changed while it was read; expected inputs that do not change: wait, then run the command again"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".preparation"]
    prepare(source, tmp_path / "out", VOCAB_SIZE)
    prepare(source, tmp_path / "fresh", VOCAB_SIZE)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["train.bin", "validation.idx", "tokenizer.model"])
def test_files_of_another_program_are_not_replaced_without_overwrite(source, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"precious")
    assert refusal(source, tmp_path / "out", VOCAB_SIZE) == (
        f"{tmp_path}/out/{name} exists without a corpus.json; expected a folder without {name}: use another folder or "
        "--overwrite"
    )
    assert contents(tmp_path / "out") == {name: b"precious"}
    prepare(source, tmp_path / "out", VOCAB_SIZE, overwrite=True)
    prepare(source, tmp_path / "fresh", VOCAB_SIZE)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_given_tokenizer_may_lie_in_the_output_folder(source, tmp_path):
    prepare(source, tmp_path / "first", VOCAB_SIZE)
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "first/tokenizer.model", tmp_path / "out/tokenizer.model")
    prepare(source, tmp_path / "out", tokenizer=tmp_path / "out/tokenizer.model")
    assert contents(tmp_path / "out")["train.bin"] == contents(tmp_path / "first")["train.bin"]


def test_reuse_removes_the_work_folder_of_a_killed_preparation_but_not_of_a_running_one(source, tmp_path):
    """The running preparation is about to overwrite the corpus."""
    prepare(source, tmp_path / "out", VOCAB_SIZE)
    (tmp_path / "out/.preparation").mkdir()
    with open(tmp_path / "out/.preparation/lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refusal(source, tmp_path / "out", VOCAB_SIZE).startswith(
            f"another process is preparing {tmp_path}/out; "
        )
        assert (tmp_path / "out/.preparation/lock").exists()
    _, reused = prepare(source, tmp_path / "out", VOCAB_SIZE)
    assert reused
    assert not (tmp_path / "out/.preparation").exists()


def test_file_system_without_locks(source, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    corpus, _ = prepare(source, tmp_path / "out", VOCAB_SIZE)
    assert corpus == read_corpus(tmp_path / "out")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megamtp: warning: {tmp_path}/out cannot be locked (Function not implemented): ")


def test_given_tokenizer_is_used(source, tmp_path):
    prepare(source, tmp_path / "first", VOCAB_SIZE)
    corpus, _ = prepare(source, tmp_path / "second", tokenizer=tmp_path / "first/tokenizer.model")
    assert corpus.vocab_size == VOCAB_SIZE
    for name in ("tokenizer.model", "train.bin", "validation.idx"):
        assert contents(tmp_path / "first")[name] == contents(tmp_path / "second")[name]
