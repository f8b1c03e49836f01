"""Helpers that start megamtp as a user would, and read what a run has written."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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


def pretrain_on_one_rank(arguments: list[str], timeout: float = 240) -> subprocess.CompletedProcess:
    """Does what `python -m megamtp.pretrain arguments...` does, in a process forked from the server of tests/ranks.py.

    The server has already imported torch and DeepSpeed, which takes a new process several seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/stdout", f"{folder}/stderr"]
        process = fork_server.Process(target=_pretrain, args=(arguments, outputs))
        process.start()
        process.join(timeout)
        assert process.exitcode is not None, f"still runs after {timeout} s"
        texts = [Path(output).read_text() for output in outputs]
        return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def _pretrain(arguments: list[str], outputs: list[str]) -> None:
    from megamtp import pretrain

    for stream, output in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(ROOT)
    sys.argv = ["pretrain", *arguments]
    pretrain.entry()


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
