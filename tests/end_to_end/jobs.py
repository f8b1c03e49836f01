"""Commands that start megamtp as a user would, and what they leave behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megamtp.cluster.ports import reserve_port

ROOT = Path(__file__).parents[2]
MODULE = "megamtp.pretrain"


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, for jobs on CPU ranks of one thread."""
    own = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return os.environ | own | {"CUDA_VISIBLE_DEVICES": "", "DS_IGNORE_CUDA_DETECTION": "TRUE"} | variables


def deepspeed(num_ranks: int, module: str = MODULE) -> list[str]:
    """The deepspeed launcher, ready for a job's arguments."""
    port = str(reserve_port())
    return ["-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks), "--master_port", port, "--module", module]


def run(command: list[str], cwd: Path = ROOT, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess:
    """Runs `python command...` to its end."""
    return subprocess.run(
        [sys.executable, *command],
        env=environment(**variables),
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def records(run_directory: Path, kind: str = "train") -> list[dict]:
    """The records of one kind in metrics.jsonl; a line that is being written is left out."""
    lines = (run_directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == kind]


def losses(run_directory: Path) -> list[list[float]]:
    """Each step's losses per head."""
    return [record["losses"] for record in records(run_directory)]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> object:
    """Polls until the condition is truthy, and returns what it is.

    Raises:
        AssertionError: it never was.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if found := condition():
                return found
        time.sleep(0.05)
    raise AssertionError(f"nothing after {seconds} s")


def ranks(run_directory: Path, module: str = MODULE) -> list[psutil.Process]:
    """The living rank processes of the job with this run directory, by rank."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if module in words and words[words.index(module) - 1] == "-m" and f"run.directory={run_directory}" in words:
                found.append((process.environ().get("RANK", "0"), process))
    # The launchers name the module, too, behind --module.
    return [process for _, process in sorted(found, key=lambda pair: int(pair[0]))]


def damage(file: Path, kind: str) -> None:
    """Of a file of a checkpoint: truncated, flipped (one bit) or missing."""
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
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.kill()
    process.communicate()
