"""Several workers: the same bytes as with one worker, errors in one line, and killed workers."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megamtp.data import corpus as corpus_module
from megamtp.data import input_files, shards, tokenised_shards, workers
from megamtp.data.corpus import prepare
from megamtp.data.input_files import Source, find_source
from megamtp.data.records import JSON_LINES, Reader, Span
from megamtp.errors import InputError

VOCAB_SIZE = 300


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """Writes inputs for shards of 1000 bytes: 60 texts, and JSON lines and Parquet that are cut into several shards."""
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 1000)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.py").write_text(f"def f{number}(x):\n    return x * {number}\n" * (number % 7))
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    lines = "".join(f'{{"text": "line {number} of {"many " * (number % 5)}"}}\n' for number in range(300))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines.upper().replace("TEXT", "text").encode()))
    table = pyarrow.table({"text": [f"row {number} {random.Random(number).random()}" for number in range(200)]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=20)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [{}, {"deduplicate": True, "tokenizer": "bytes"}])
def test_same_bytes_for_any_number_of_workers(texts, tmp_path, options):
    source = find_source([texts])
    assert len(shards.cut_into_shards(source.files, False)) > 8
    for number in (1, 2, 5):
        prepare(source, tmp_path / str(number), None if options else VOCAB_SIZE, workers=number, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_same_bytes_for_any_size_of_shards(texts, tmp_path, monkeypatch):
    for size in (300, 2000, 1 << 20):
        monkeypatch.setattr(shards, "MIN_SHARD_BYTES", size)
        prepare(find_source([texts]), tmp_path / str(size), VOCAB_SIZE)
    assert contents(tmp_path / "300") == contents(tmp_path / "2000") == contents(tmp_path / str(1 << 20))


@pytest.mark.parametrize("options", [{"vocab_size": 280}, {"tokenizer": "bytes", "deduplicate": True}])
def test_long_text_is_divided_among_workers(tmp_path, monkeypatch, options):
    """Shards end where pieces end, even inside a line of multi-byte characters."""
    monkeypatch.setattr(input_files, "PIECE_CHARACTERS", 100)
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        text = "".join(f"line {line} \u00e9\n" * (line % 3) for line in range(500)) + "\u00e9" * 5000
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8-sig" if name == "b.txt" else "utf-8")
    (tmp_path / "texts/latin.txt").write_bytes(b"caf\xe9" * 5000)
    source, written = find_source([tmp_path / "texts"]), []
    for size, number in ((1 << 20, 1), (1000, 1), (1000, 3)):
        monkeypatch.setattr(shards, "MIN_SHARD_BYTES", size)
        corpus, _ = prepare(source, tmp_path / f"{size}-{number}", workers=number, **options)
        written.append(contents(tmp_path / f"{size}-{number}"))
    assert len(shards.cut_into_shards(source.files, True)) > 20
    if "tokenizer" in options:  # a trained tokenizer depends on how its sample is cut into chunks
        assert written[0] == written[1] and corpus.duplicates == 1
    assert written[1] == written[2]
    assert corpus.unreadable_files == ["latin.txt"]


@pytest.mark.parametrize("size", [1, 7, 50, 10**6])
def test_every_json_line_is_in_exactly_one_shard(tmp_path, monkeypatch, size):
    """Some lines end at a shard boundary, and some boundaries lie inside a character."""
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", size)
    lines = ['{"text": "' + "\u00e9" * (number % 4) + f'{number}"}}' for number in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + "\n".join(lines) + "\n\n" + lines[0])
    file = Span("a.jsonl", path, JSON_LINES)
    documents_of_shards = [
        document for shard in shards.cut_into_shards([file], False) for document in shard.documents(Reader())
    ]
    assert documents_of_shards == list(Source([file]).documents())
    assert [text for _, text in documents_of_shards] == [line[10:-2] for line in [*lines, lines[0]]]


def test_skipped_records_are_the_same_for_any_number_of_workers(texts, tmp_path):
    bad = '{"text": null}\n'
    (texts / "a.jsonl").write_text("".join(f'{bad}{{"text": "a {number}"}}\n' for number in range(200)))
    (texts / "d.part").write_text(f'{bad}{{"text": "b"}}\n')
    with pytest.raises(
        InputError, match=r"a\.jsonl:1: 'text' is null; .*, or skip bad records with --on-bad-record skip$"
    ):
        prepare(find_source([texts]), tmp_path / "out", tokenizer="bytes")
    for number in (1, 3):
        source = find_source([texts], skip_bad_records=True)
        corpus, _ = prepare(source, tmp_path / str(number), VOCAB_SIZE, workers=number)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    listed = [f"a.jsonl:{2 * number + 1}: 'text' is null" for number in range(200)] + ["d.part:1: 'text' is null"]
    assert (tmp_path / "1/skipped_records.txt").read_text().splitlines() == listed
    assert corpus.skipped_records == 201 and corpus.files == {"jsonl": 3, "parquet": 1, "text": 61}
    for name in ("a.jsonl", "d.part"):
        (texts / name).write_text((texts / name).read_text().replace(bad, ""))
    prepare(find_source([texts]), tmp_path / "1", VOCAB_SIZE, overwrite=True)
    assert "skipped_records.txt" not in contents(tmp_path / "1")


def refusal(source: Source, output: Path, **options) -> str:
    with pytest.raises(InputError) as error:
        prepare(source, output, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shards_that_were_tokenised_before_an_error_are_reused(texts, tmp_path, monkeypatch):
    source, read_documents = find_source([texts]), tokenised_shards._documents
    prepare(source, tmp_path / "whole", tokenizer="bytes")

    def full_disk(shard, *arguments):
        if shard.spans[0].name > "30":
            raise OSError(28, "No space left on device")
        return read_documents(shard, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenised_shards, "_documents", full_disk)
        with pytest.raises(InputError, match="cannot be written to: No space left on device"):
            prepare(source, tmp_path / "out", tokenizer="bytes", workers=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".preparation"]
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/.preparation").glob("*.json")}
    assert finished
    started = []
    monkeypatch.setattr(
        tokenised_shards, "_documents", lambda *arguments: started.append(arguments) or read_documents(*arguments)
    )
    prepare(source, tmp_path / "out", tokenizer="bytes")
    assert len(started) == len(shards.cut_into_shards(source.files, False)) - len(finished)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "left"), [({"vocab_size": VOCAB_SIZE}, []), ({"tokenizer": "bytes"}, [".preparation"])]
)
def test_first_bad_record_in_the_inputs_order_is_named(texts, tmp_path, options, left):
    content = (texts / "a.jsonl").read_text().splitlines()
    content[100] = content[250] = '{"txt": ""}'
    (texts / "a.jsonl").write_text("\n".join(content))
    message = refusal(find_source([texts]), tmp_path / "out", **options, workers=3)
    assert message.startswith(f"{texts}/a.jsonl:101: no text under 'text' (found: 'txt')")
    # With a vocabulary size, the error occurs while the tokenizer's sample is read, before any shard is tokenised.
    assert [path.name for path in (tmp_path / "out").iterdir()] == left


def test_preparation_that_failed_at_a_bad_record_resumes_if_bad_records_are_skipped(texts, tmp_path, monkeypatch):
    """Conversely, a preparation that does not skip bad records does not reuse shards that have skipped some."""
    with open(texts / "a.jsonl", "a") as stream:
        stream.write('{"text": null}\n')
    strict, lenient = find_source([texts]), find_source([texts], skip_bad_records=True)
    prepare(lenient, tmp_path / "whole", tokenizer="bytes")
    assert "'text' is null" in refusal(strict, tmp_path / "out", tokenizer="bytes")
    finished = len(list((tmp_path / "out/.preparation").glob("*.json")))
    started, read_documents = [], tokenised_shards._documents
    with monkeypatch.context() as patch:
        patch.setattr(
            tokenised_shards, "_documents", lambda *arguments: started.append(arguments) or read_documents(*arguments)
        )
        patch.setattr(corpus_module, "split_threshold", full_disk)
        assert "No space" in refusal(lenient, tmp_path / "out", tokenizer="bytes")
    assert finished and len(started) == len(shards.cut_into_shards(strict.files, False)) - finished
    assert "'text' is null" in refusal(strict, tmp_path / "out", tokenizer="bytes")
    prepare(lenient, tmp_path / "out", tokenizer="bytes")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


def test_preparation_resumes_after_a_killed_worker(texts, tmp_path, monkeypatch):
    source, read_documents = find_source([texts]), tokenised_shards._documents

    def killed(shard, *arguments):
        if shard.spans[0].name > "30":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_documents(shard, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenised_shards, "_documents", killed)
        assert refusal(source, tmp_path / "out", vocab_size=VOCAB_SIZE, workers=2).startswith(
            "a worker process was killed"
        )
    prepare(source, tmp_path / "out", VOCAB_SIZE, workers=2)
    prepare(source, tmp_path / "whole", VOCAB_SIZE)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore SIGINT
from pathlib import Path
from megamtp.data import shards, tokenised_shards
from megamtp.data.corpus import prepare
from megamtp.data.input_files import find_source
shards.MIN_SHARD_BYTES = 1000
tokenised_shards._documents = lambda *arguments: time.sleep(100)
prepare(find_source([Path(sys.argv[1])]), Path(sys.argv[2]), tokenizer="bytes", workers=2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_when_their_parent_is_killed(texts, tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", SLOW, texts, tmp_path / "out"], stderr=subprocess.DEVNULL)
    parent = psutil.Process(process.pid)
    while len(children := parent.children()) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    assert refusal(find_source([texts]), tmp_path / "out").startswith(f"another process is preparing {tmp_path}/out; ")
    process.send_signal(number)
    process.wait(10)
    ended, running = psutil.wait_procs(children, 10)
    assert (len(ended), running) == (2, [])
    prepare(find_source([texts]), tmp_path / "out", VOCAB_SIZE)


FORKED = """
import os, sys, threading
from pathlib import Path
from megamtp.data import shards
from megamtp.data.corpus import prepare
from megamtp.data.input_files import find_source
shards.MIN_SHARD_BYTES = 1000
os.register_at_fork(before=lambda: print([thread.name for thread in threading.enumerate()]))
for name in ("first", "second"):
    prepare(find_source([Path(sys.argv[1])]), Path(sys.argv[2]) / name, tokenizer="bytes", workers=2)
"""


def test_no_other_thread_runs_when_workers_are_forked(texts, tmp_path):
    """A lock that another thread (such as tqdm's) holds during the fork would never be released in the worker."""
    finished = subprocess.run(
        [sys.executable, "-c", FORKED, texts, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert finished.stdout.splitlines() == ["['MainThread']"] * 4, finished.stderr


INTERRUPTED_FORK = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from megamtp.data import workers
os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGINT))
with workers._processes(2):
    print("continued")
"""


def test_ctrl_c_during_the_fork_of_a_worker_is_not_lost():
    """Python prints and then ignores exceptions in at-fork hooks, which modules such as logging register."""
    finished = subprocess.run([sys.executable, "-c", INTERRUPTED_FORK], capture_output=True, text=True, timeout=60)
    assert finished.returncode == -signal.SIGINT and "KeyboardInterrupt" in finished.stderr
    assert "continued" not in finished.stdout and "ignored" not in finished.stderr


RANK = """
from megamtp.commands import prepare_data
from megamtp.data import shards
shards.MIN_SHARD_BYTES = 1000
prepare_data.entry()
"""


def mpirun(ranks: int, *arguments) -> subprocess.CompletedProcess:
    """Runs prepare_data with shards of 1000 bytes under the mpirun in Python's folder."""
    launcher = Path(sys.executable).with_name("mpirun")
    command = [launcher, "-n", str(ranks), sys.executable, "-c", RANK, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_same_bytes_with_mpi_ranks(texts, tmp_path):
    prepare(find_source([texts]), tmp_path / "out", VOCAB_SIZE)
    arguments = ["--input", texts, "--vocab-size", str(VOCAB_SIZE)]
    finished = mpirun(3, *arguments, "--output", tmp_path / "ranks")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert len(finished.stdout.splitlines()) == 6
    assert contents(tmp_path / "ranks") == contents(tmp_path / "out")
    failed = mpirun(2, *arguments, "--output", tmp_path / "wrong", "--json-key", "body")
    assert failed.returncode == 2
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("megamtp: error: ")]
    assert "a.jsonl:1: no text under 'body'" in line
    assert not (tmp_path / "wrong").exists() or list((tmp_path / "wrong").iterdir()) == []


def test_mpirun_without_mpi4py_is_refused(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert workers.num_mpi_ranks() == 2
    with pytest.raises(InputError, match="mpi4py is not installed; run: pip install"), workers.mpi_ranks():
        pass
