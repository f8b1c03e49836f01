"""Tests of the command line of prepare_data: its summary, and one line with exit status 2 for each mistake."""

import fcntl
import gzip
import json
import os
import pty
import re
import resource
import shutil
import struct
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import pytest
import zstandard

from megamtp.commands import prepare_data
from tests import tokenizer_kinds

TEXT = "".join(f"line {number} of a text\n" for number in range(3000))
SMALL = ["--vocab-size", "290"]


@pytest.fixture
def call(tmp_path, monkeypatch, call_command):
    """call(*arguments) -> (exit status, stdout, stderr), run in a folder with some inputs."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("short.txt").write_text("short")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("bad.jsonl").write_text('{"text": "good"}\n{"txt": "a"}\n')
    Path("broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    Path("null.jsonl").write_text('{"text": "good"}\n{"text": null}\n')
    Path("array").write_text('[{"text": "good"}]')
    Path("zeros").write_bytes(bytes(9))
    Path("links").mkdir()
    Path("links/a.txt").symlink_to("nowhere")
    Path("empty").mkdir()
    Path("middle").mkdir()
    Path("middle/a.txt").write_text(TEXT)
    Path("middle/b.txt").symlink_to("/proc/self/mem")  # can be opened, but not read
    Path("middle/c.txt").write_text(TEXT)
    Path("bytes.jsonl").write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    Path("cut.jsonl.gz").write_bytes(gzip.compress(TEXT.encode())[:-10])
    Path("cut.txt.zst").write_bytes(zstandard.compress(TEXT.encode())[:-1])
    Path("cut.parquet").write_bytes(b"PAR1" + bytes(100))
    return partial(call_command, prepare_data)


CASES = {
    "missing input": (["--input", "text.txt", "none"], ["none does not exist"]),
    "nothing found": (["--input", "empty"], ["no text files in empty"]),
    "nothing left": (["--input", "text.txt", "--exclude", "text.txt"], ["no text files in text.txt"]),
    "empty input": (["--input", ""], ["--input", "the name is empty", "--help"]),
    "empty output": (["--input", "text.txt", "--output", ""], ["--output", "the name is empty"]),
    "empty tokenizer": (["--input", "text.txt", "--tokenizer", ""], ["--tokenizer", "the name is empty"]),
    "name too long": (["--input", "x" * 300], ["File name too long"]),
    "too little text": (
        ["--input", "short.txt"],
        ["found 1 documents", "short.txt; expected", "cut into pieces: add text"],
    ),
    "nothing readable": (
        ["--input", "latin.txt"],
        ["found 0 documents", "passed over 1 files that are not UTF-8 text, the first: latin.txt", "convert"],
    ),
    "wrong key": (["--input", "bad.jsonl"], ["bad.jsonl:2", "'txt'", "--json-key"]),
    "not JSON": (["--input", "broken.jsonl"], ["broken.jsonl:2", "not JSON"]),
    "unreadable file in the middle": (["--input", "middle"], ["middle/b.txt: ", "expected a readable file"]),
    "line that is not UTF-8": (["--input", "bytes.jsonl"], ["bytes.jsonl:2", "utf-8"]),
    "null": (["--input", "null.jsonl"], ["null.jsonl:2: 'text' is null", "--on-bad-record skip"]),
    "all records bad": (
        ["--input", "null.jsonl", "--on-bad-record", "skip", "--json-key", "body"],
        ["found 0 documents", "skipped 2 bad records, the first: null.jsonl:1: no text under 'body'"],
    ),
    "link to nowhere": (["--input", "links"], ["links/a.txt is a link to nowhere, which does not exist"]),
    "binary": (["--input", "text.txt", "zeros"], ["zeros is binary"]),
    "records in an array": (["--input", "array"], ["array: JSON with 'text'", "--format"]),
    "unknown format": (["--input", "text.txt", "--format", "csv"], ["--format", "'csv'"]),
    "damaged gz": (["--input", "cut.jsonl.gz"], ["cut.jsonl.gz"]),
    "damaged zst": (["--input", "cut.txt.zst"], ["cut.txt.zst: damaged"]),
    "damaged parquet": (["--input", "cut.parquet"], ["cut.parquet: damaged"]),
    "bytes and another vocabulary": (
        ["--input", "text.txt", "--tokenizer", "bytes", "--vocab-size", "300"],
        ["bytes has 257 pieces; expected 300"],
    ),
    "no worker": (["--input", "text.txt", "--workers", "0"], ["--workers 0"]),
    "no validation": (
        ["--input", "text.txt", "--validation-fraction", "0"],
        ["--validation-fraction 0.0", "between 0 and 1"],
    ),
    "all validation": (["--input", "text.txt", "--validation-fraction", "1"], ["--validation-fraction 1.0"]),
    "not a fraction": (["--input", "text.txt", "--validation-fraction", "nan"], ["--validation-fraction nan"]),
    "vocabulary too small": (["--input", "text.txt", "--vocab-size", "100"], ["100 pieces", "expected at least"]),
    "vocabulary too large": (["--input", "text.txt", "--vocab-size", "100000"], ["100000 pieces", "expected at most"]),
    "vocabulary below nothing": (["--input", "text.txt", "--vocab-size", "-1"], ["-1 pieces"]),
    "vocabulary beyond 32 bits": (["--input", "text.txt", "--vocab-size", "9999999999"], ["9999999999 pieces"]),
    "missing tokenizer": (["--input", "text.txt", "--tokenizer", "none.model"], ["none.model", "No such file"]),
    "tokenizer is a folder": (["--input", "text.txt", "--tokenizer", "empty"], ["empty", "Is a directory"]),
    "no tokenizer": (["--input", "text.txt", "--tokenizer", "text.txt"], ["text.txt", "not a SentencePiece model"]),
    "output is a file": (["--input", "text.txt", *SMALL, "--output", "short.txt"], ["short.txt", "File exists"]),
    "output below a file": (
        ["--input", "text.txt", *SMALL, "--output", "short.txt/out"],
        ["short.txt/out", "Not a directory"],
    ),
    "output cannot be made": (
        ["--input", "text.txt", *SMALL, "--output", "/proc/out"],
        ["/proc/out", "cannot be written"],
    ),
    "output too long": (["--input", "text.txt", *SMALL, "--output", "x" * 300], ["File name too long"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mistake_is_one_line(case, call):
    arguments, words = CASES[case]
    status, out, err = call("--output", "out", *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("megamtp: error: ")
    assert all(word in line for word in words), line
    assert not Path("out").exists() or list(Path("out").iterdir()) == []


@pytest.mark.parametrize(
    ("tokenizer", "marks", "ends"), [("ours", 0, 3), ("bytes", 0, 2), ("dummy prefix", 2, 3), ("normalising", 2, 3)]
)
def test_special_characters_in_texts_are_counted(call, tokenizer, marks, ends):
    texts = [
        "a\u2581b",
        "one\u2581</s>two",
        "<|endoftext|>",
        "<|endoftext|></s> twice",
        "</s",
        "plain",
        "plain",
        "more",
    ]
    texts = [*texts, "<|endoftext|>"]  # a duplicate
    Path("marks.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = tokenizer if tokenizer == "bytes" else str(tokenizer_kinds.train_kind(tokenizer, Path("given.model")))
    arguments = ["--input", "marks.jsonl", "--tokenizer", model, "--output", "out", "--deduplicate"]
    status, out, err = call(*arguments)
    assert (status, err) == (0, "")
    counted = dict(
        reversed(line.split(" documents contain ")) for line in out.splitlines() if " documents contain " in line
    )
    space_marks = {"the character U+2581, which this tokenizer reads as a space": str(marks)} if marks else {}
    words = "it is tokenised as ordinary characters and does not end the document"
    assert counted == {f"an end-of-text marker such as </s> or <|endoftext|>: {words}": str(ends), **space_marks}
    assert call(*arguments)[1] == out.replace(" nats", " nats (reused)")


def test_corpus_is_prepared_reused_and_overwritten(call):
    arguments = ["--input", "text.txt", "latin.txt", "--output", "out", *SMALL]
    status, first, err = call(*arguments)
    assert (status, err) == (0, "")
    assert "passed over 1 files that are not UTF-8, the first: latin.txt\n" in first
    assert re.search(r"^train: 3 documents, [\d,]+ tokens in out/train\.bin, \.idx, \.crc$", first, re.MULTILINE)
    assert re.search(r"^290 pieces, \d\.\d\d bytes per token, unigram entropy .* \d\.\d{3} nats$", first, re.MULTILINE)
    assert call(*arguments) == (0, first.replace(" nats", " nats (reused)"), "")
    status, out, err = call(*arguments, "--seed", "1")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"megamtp: error: out holds a corpus of other inputs or settings; .*--overwrite.*\n", err)
    status, out, err = call(*arguments, "--seed", "1", "--overwrite")
    assert (status, err) == (0, "")
    assert "(reused)" not in out


def test_summary_counts_files_that_were_read_and_passed_over(call):
    """The input folder also holds the output, which a second call must not read."""
    for name in ("in/.git", "in/tests"):
        Path(name).mkdir(parents=True)
    Path("in/perl.pm").write_text(TEXT)
    Path("in/part-00000").write_text('{"text": "good"}\n{"text": null}\n{"text": "\\ud800"}\n')
    for name in ("a.tar", "b.zip"):
        Path("in", name).write_bytes(bytes(100))
    arguments = ["--input", "in", "--exclude", "tests", "--on-bad-record", "skip", "--tokenizer", "bytes"]
    for output in ("in/out", "in"):
        status, out, err = call(*arguments, "--output", output)
        assert (status, err) == (0, "")
        assert out.splitlines()[:5] == [
            "read 1 files of JSON lines, 1 text files",
            "passed over 2 binary or UTF-16 files, the first: a.tar",
            "passed over 1 files and folders that --exclude names, the first: tests",
            "passed over 1 hidden files and folders, the first: .git",
            f"skipped 2 bad records, listed in {output}/skipped_records.txt",
        ]
        listed = Path(output, "skipped_records.txt").read_text()
        assert listed == "part-00000:2: 'text' is null\npart-00000:3: half a surrogate pair under 'text'\n"
        assert call(*arguments, "--output", output) == (0, out.replace(" nats", " nats (reused)"), "")
        shutil.rmtree("in/out", ignore_errors=True)


def test_tokenizer_with_another_vocabulary_size_is_an_error(call):
    assert call("--input", "text.txt", "--output", "out", *SMALL)[0] == 0
    again = ["--input", "text.txt", "--output", "again", "--tokenizer", "out/tokenizer.model"]
    status, out, err = call(*again, "--vocab-size", "300")
    assert (status, out) == (2, "")
    assert err.startswith("megamtp: error: out/tokenizer.model has 290 pieces; expected 300: ")
    assert not Path("again").exists()
    assert call(*again, *SMALL)[0] == 0


def test_progress_bars_on_a_terminal(call):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    arguments = ["--input", "text.txt", "text.txt", "--tokenizer", "bytes", "--output", "out"]
    command = [sys.executable, "-m", "megamtp.commands.prepare_data", *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, text=True)
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert finished.returncode == 0
    assert re.search(r"tokenising: 100%.*\| 118k/118k \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", shown), shown
    assert re.search(r"merging: 100%.* 1/1 ", shown), shown


@pytest.mark.parametrize("workers", ["1", "2"])
def test_full_disk_while_parts_are_written(call, workers):
    """A limit on file sizes acts as the full disk. With room again, the same command continues."""
    Path("long").mkdir()
    for number in range(3):
        Path(f"long/{number}.txt").write_text("x" * (500_000 << number))  # the last file is a separate shard
    arguments = ["--input", "long", "--tokenizer", "bytes", "--output", "out", "--workers", workers]
    finished = subprocess.run(
        [sys.executable, "-m", "megamtp.commands.prepare_data", *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_500_000, 3_500_000)),
        capture_output=True,
        text=True,
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert (
        finished.stderr
        == "megamtp: error: out cannot be written to: File too large; choose another folder or make room\n"
    )
    assert [path.name for path in Path("out").iterdir()] == [".preparation"]
    assert not list(Path("out/.preparation").glob("*.partial"))
    assert call(*arguments)[0] == 0
    assert not Path("out/.preparation").exists()


@pytest.mark.parametrize(
    "arguments", [["--input", "text.txt"], ["--output", "out"], ["--input", "a", "--standard-library"]]
)
def test_wrong_usage_refers_to_help(call, arguments):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"megamtp: error: .+; see .* --help\n", err)
