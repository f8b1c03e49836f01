"""Tests of the local command: the number of ranks, the processes that are ranks, and the exit status.

tests/end_to_end/test_signals.py and test_launchers.py launch whole jobs.
"""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from megamtp.commands import local
from megamtp.errors import InputError

SLEEPER = "print('started', flush=True); import time; time.sleep(100)"


def launch(module: str = "module", job_id: str = "job", received: int = 0, status: int = 0) -> local.Launch:
    """Returns a Launch without processes, whose launcher seems to have ended with this status."""
    result = local.Launch.__new__(local.Launch)
    result._module, result._job_id, result._received = module, job_id, received
    result._launcher = SimpleNamespace(wait=lambda: status)
    return result


@pytest.mark.parametrize(("variable", "num_gpus", "expected"), [("3", 8, 3), ("", 4, 4), (None, 4, 4), (None, 0, 2)])
def test_number_of_ranks(variable, num_gpus, expected, monkeypatch):
    monkeypatch.delenv("MEGAMTP_RANKS", raising=False)
    if variable is not None:
        monkeypatch.setenv("MEGAMTP_RANKS", variable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert local.num_ranks() == expected


@pytest.mark.parametrize("variable", ["0", "-1", "two", "1.5"])
def test_invalid_number_of_ranks_is_an_error(variable, monkeypatch):
    monkeypatch.setenv("MEGAMTP_RANKS", variable)
    with pytest.raises(InputError, match=f"MEGAMTP_RANKS={variable}; expected a number of ranks"):
        local.num_ranks()


@pytest.mark.parametrize(
    ("received", "status", "expected"),
    [
        (0, 0, 0),
        (0, 2, 2),
        (0, -signal.SIGKILL, 1),
        (signal.SIGTERM, 0, 0),  # the job has saved
        (signal.SIGTERM, -signal.SIGTERM, 143),
        (signal.SIGTERM, 256 - signal.SIGTERM, 143),
        (signal.SIGINT, 256 - signal.SIGTERM, 143),  # forwarded to the ranks as SIGTERM
        (signal.SIGUSR1, -signal.SIGUSR1, 128 + signal.SIGUSR1),
        (signal.SIGUSR1, 1, 1),
    ],
)
def test_exit_status(received, status, expected):
    assert launch(received=received, status=status).wait() == expected


@pytest.fixture
def start(tmp_path):
    """start(module, *arguments, job=ID) -> a process of this job that runs a sleeping module of this name."""
    processes = []

    def start_module(module: str, *arguments: str, job: str) -> subprocess.Popen:
        (tmp_path / f"{module}.py").write_text(SLEEPER)
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"PYTHONPATH": str(tmp_path), local.JOB_VARIABLE: job},
            stdout=subprocess.PIPE,
        )
        processes.append(process)
        assert process.stdout.readline() == b"started\n"
        return process

    yield start_module
    for process in processes:
        process.kill()
        process.communicate()


def test_ranks_are_the_processes_of_this_job_that_run_its_module(start):
    rank = start("sleeping_rank", job="job")
    start("sleeping_rank", job="another")
    start("sleeping_launcher", "sleeping_rank", job="job")
    assert [process.pid for process in launch("sleeping_rank")._ranks()] == [rank.pid]


def test_ranks_that_outlive_the_launcher_are_ended_and_the_job_fails(start, monkeypatch):
    rank, ended = start("sleeping_rank", job="job"), []
    monkeypatch.setattr(local, "_end", ended.extend)
    assert launch("sleeping_rank").wait() == 1
    assert [process.pid for process in ended] == [rank.pid]


def test_rank_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.3)
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as rank:
        assert rank.stdout.readline() == b"started\n"
        start_seconds = time.monotonic()
        local._end([psutil.Process(rank.pid)])
        assert rank.wait(10) == -signal.SIGKILL and time.monotonic() - start_seconds > 0.3
