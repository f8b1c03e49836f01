"""Helpers that start megamtp as a user would, and read what a run has written."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

import psutil

from megamtp.cluster.ports import reserve_port
from tests.ranks import fork_server

ROOT = Path(__file__).parents[2]
MODULE = "megamtp.pretrain"


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment variables of a job on CPU ranks with one thread each."""
    own = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return os.environ | own | {"CUDA_VISIBLE_DEVICES": "", "DS_IGNORE_CUDA_DETECTION": "TRUE"} | variables


def deepspeed(num_ranks: int, module: str = MODULE) -> list[str]:
    """Returns the arguments of Python that start the deepspeed launcher, to be followed by those of the job."""
    port = str(reserve_port())
    return ["-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks), "--master_port", port, "--module", module]


def run(command: list[str], cwd: Path = ROOT, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess:
    """Runs `python command...` and waits until it ends."""
    return subprocess.run(
        [sys.executable, *command],
        env=environment(**variables),
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
    )


class ForkedJob:
    """A job without a launcher, whose ranks are forked from the server of tests/ranks.py. Kills them at its exit.

    The server has already imported torch and DeepSpeed, which takes a new process several seconds. Tests of launchers,
    of signals and of a process's start and end use `run` or the fixture `start` instead.
    """

    def __init__(self, arguments: list[str], num_ranks: int, entry: Callable[[], None], variables: dict[str, str]):
        """Starts the job: see `pretrain`."""
        self._folder, self._arguments, self.ranks = tempfile.TemporaryDirectory(), arguments, []
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port())}
        for rank in range(num_ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)} | address
            own = (place if num_ranks > 1 else {}) | variables
            process = fork_server.Process(target=_run_entry, args=(entry, arguments, self._files(rank), own))
            process.start()
            self.ranks.append(process)

    def _files(self, rank: int) -> list[str]:
        """Returns the files that receive a rank's stdout and stderr."""
        return [f"{self._folder.name}/{name}{rank}" for name in ("stdout", "stderr")]

    def __enter__(self) -> "ForkedJob":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()
        self._folder.cleanup()

    def join(self, timeout: float = 240) -> list[str]:
        """Waits until every rank has ended. Returns what each has printed."""
        deadline = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0, deadline - time.monotonic()))
            assert rank.exitcode is not None, f"still runs after {timeout} s"
        return ["".join(Path(file).read_text() for file in self._files(rank)) for rank in range(len(self.ranks))]

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Waits until all ranks have ended. When one has failed, ends the others, as launchers do."""
        deadline, failed = time.monotonic() + timeout, []
        while not failed and time.monotonic() < deadline and (running := [r for r in self.ranks if r.is_alive()]):
            connection.wait([rank.sentinel for rank in running], timeout=1)
            failed = [rank.exitcode for rank in self.ranks if rank.exitcode]
        for rank in self.ranks if failed else ():
            rank.terminate()
        self.join(max(30, deadline - time.monotonic()))
        printed = zip(*(map(Path, self._files(rank)) for rank in range(len(self.ranks))), strict=True)
        stdout, stderr = ("".join(file.read_text() for file in files) for files in printed)
        return subprocess.CompletedProcess(self._arguments, failed[0] if failed else 0, stdout, stderr)


def _pretrain() -> None:
    from megamtp import pretrain

    pretrain.entry()


def start_pretrain(
    arguments: list[str], num_ranks: int = 1, entry: Callable[[], None] = _pretrain, **variables: str
) -> ForkedJob:
    """Starts what `pretrain` runs, for a `with` statement."""
    return ForkedJob(arguments, num_ranks, entry, variables)


def pretrain(
    arguments: list[str],
    num_ranks: int = 1,
    entry: Callable[[], None] = _pretrain,
    timeout: float = 240,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Does what `python -m megamtp.pretrain arguments...` does on every rank of a ForkedJob, until it ends.

    Args:
        entry: a function of a module, to be called instead of megamtp.pretrain.entry.
    """
    with start_pretrain(arguments, num_ranks, entry, **variables) as job:
        return job.wait(timeout)


def _run_entry(entry: Callable[[], None], arguments: list[str], files: list[str], variables: dict[str, str]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ |= environment(**variables)
    warnings.simplefilter("ignore")
    os.chdir(ROOT)
    sys.argv = ["pretrain", *arguments]
    entry()


def records(run_directory: Path, kind: str = "train") -> list[dict]:
    """Returns the records of one kind in metrics.jsonl, without an incomplete last line."""
    lines = (run_directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    complete = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in complete if record["kind"] == kind]


def losses(run_directory: Path) -> list[list[float]]:
    """Returns the losses of each step, per head."""
    return [record["losses"] for record in records(run_directory)]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> object:
    """Polls until the condition returns a true value, and returns that value.

    Raises:
        AssertionError: the condition was not true within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if value := condition():
                return value
        time.sleep(0.05)
    raise AssertionError(f"the condition was not true within {seconds} s")


def ranks(run_directory: Path, module: str = MODULE) -> list[psutil.Process]:
    """Returns the running rank processes of the job with this run directory, in the order of their ranks."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if module in words and words[words.index(module) - 1] == "-m" and f"run.directory={run_directory}" in words:
                processes.append((process.environ().get("RANK", "0"), process))
    # Launchers also have the module's name in their arguments, but after --module.
    return [process for _, process in sorted(processes, key=lambda pair: int(pair[0]))]


def damage(file: Path, kind: str) -> None:
    """Damages a checkpoint's file. `kind`: truncated, flipped (one bit) or missing."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    match kind:
        case "truncated":
            file.write_bytes(content[:-100])
        case "flipped":
            file.write_bytes(content)
        case "missing":
            file.unlink()


def kill_tree(process: subprocess.Popen) -> None:
    """Kills a process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.kill()
    process.communicate()
