"""Tests of a full disk: one line, exit status 2, complete files stay intact, partial ones go, and work can continue."""

import functools
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamtp.checkpoint.store import checkpoints, newest_checkpoint, verify
from tests.end_to_end import faulty_pretrain
from tests.end_to_end.jobs import ROOT, environment, pretrain, records

TMPFS_BYTES = 32 * 2**20
RANKS = 2


class SmallDisk:
    """A folder on its own small tmpfs, or an ordinary folder with a limit on file sizes if mounting is not allowed."""

    def __init__(self, folder: Path):
        self.folder, self._filler, self._limit = folder, folder / "filler", resource.RLIM_INFINITY
        command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
        self.is_mounted = subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0

    def leave(self, num_bytes: int) -> None:
        """Leaves `num_bytes` of free space. Without a tmpfs, limits each file to one rank's share of them instead."""
        if self.is_mounted:
            with open(self._filler, "wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(self.folder).free - num_bytes)
        else:
            self._limit = num_bytes // RANKS

    def make_room(self) -> None:
        """Undoes `leave`."""
        self._filler.unlink(missing_ok=True)
        self._limit = resource.RLIM_INFINITY

    def run(self, command: list[str]) -> subprocess.CompletedProcess:
        """Runs `python command...` and waits until it ends."""
        return subprocess.run(
            [sys.executable, *command],
            env=environment(),
            cwd=ROOT,
            timeout=240,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (self._limit, self._limit)),
        )

    def pretrain(self, arguments: list[str]) -> subprocess.CompletedProcess:
        """Trains on RANKS ranks."""
        return pretrain(arguments, RANKS, functools.partial(faulty_pretrain.limit_files, self._limit))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = SmallDisk(folder)
    yield disk
    if disk.is_mounted:
        subprocess.run(["umount", str(folder)], check=True)


def error_of(finished: subprocess.CompletedProcess) -> str:
    """Returns the only error line of a command that failed."""
    output = finished.stdout + finished.stderr
    assert finished.returncode == 2, output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("megamtp: error: ")]
    return line


@pytest.mark.timeout(600)
def test_checkpoint_that_does_not_fit_ends_the_run_and_keeps_the_previous_one(small_disk, arguments):
    """The disk has room for the file of either rank, but not for both."""
    run = small_disk.folder / "run"
    arguments = [*arguments, "run.save_every_steps=2", "data.validation=null", f"run.directory={run}"]
    finished = small_disk.pretrain([*arguments, "train.steps=2"])
    assert finished.returncode == 0, finished.stderr
    previous = newest_checkpoint(run)
    manifest = verify(previous)
    small_disk.leave(manifest.file_bytes * 3 // 4)
    line = error_of(small_disk.pretrain([*arguments, "train.steps=1000000"]))
    assert f"{run}/checkpoints/step-0000004 cannot be written" in line
    assert ("make room" if small_disk.is_mounted else "allow larger files") in line
    assert list((run / "checkpoints").iterdir()) == [previous]
    assert verify(previous) == manifest
    small_disk.make_room()
    finished = small_disk.pretrain([*arguments, "train.steps=4"])
    assert finished.returncode == 0, finished.stderr
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
    assert [verify(checkpoint).step for checkpoint in checkpoints(run)] == [2, 4]


def test_corpus_that_does_not_fit_leaves_no_file_and_can_be_prepared_later(small_disk, tmp_path):
    (tmp_path / "text.txt").write_text("some words of it\n" * 100_000)  # 3.4 MB of tokens
    corpus = small_disk.folder / "corpus"
    command = [
        "tools/prepare_data.py",
        "--input",
        str(tmp_path / "text.txt"),
        "--tokenizer",
        "bytes",
        "--output",
        str(corpus),
    ]
    small_disk.leave(2 * 2**20)
    line = error_of(small_disk.run(command))
    assert f"{corpus} cannot be written to: " in line and "make room" in line
    assert not [path for path in corpus.rglob("*") if path.is_file()]
    small_disk.make_room()
    finished = small_disk.run(command)
    assert finished.returncode == 0, finished.stderr
    assert (corpus / "train.bin").stat().st_size > 3 * 2**20
    assert (corpus / "corpus.json").exists()
