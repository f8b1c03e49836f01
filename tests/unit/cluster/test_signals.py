"""Tests of how a rank recognises its launcher, and what it does when the launcher dies."""

import os
import signal
import subprocess
import sys

import pytest

from megamtp.cluster import signals
from megamtp.cluster.signals import LAUNCHER_VARIABLE, StopRequest

WAITING = """
import time
from megamtp.cluster.signals import StopRequest
print(StopRequest(False).asked, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/opt/bin/python3.11 /opt/bin/deepspeed --num_gpus 2 train.yaml", True),
        ("/opt/bin/python -u -m deepspeed.launcher.launch --world_info=e30= megamtp.pretrain", True),
        ("python -m torch.distributed.run -m megamtp.pretrain", True),
        ("/opt/bin/python /opt/bin/torchrun -m megamtp.pretrain", True),
        ("/usr/bin/mpiexec.hydra -n 2 python", True),
        ("mpirun -n 2 python -m megamtp.pretrain", True),
        ("bash torchrun-tests/start.sh", False),
        ("bash start.sh mpirun", False),
        ("python -m megamtp.commands.local run.directory=deepspeed", False),
        ("", False),
    ],
)
def test_launcher_is_recognised_by_its_command_line(command, expected):
    assert signals._is_launcher(command.split()) == expected


def test_shell_that_starts_a_launcher_is_no_launcher():
    assert not signals._is_launcher(["bash", "-c", "torchrun -m megamtp.pretrain & sleep 1"])


def test_signal_during_a_check_of_the_launcher_is_kept(monkeypatch):
    request = StopRequest(False)
    request._watched = [None]

    def interrupted(process: None) -> bool:
        request._receive(signal.SIGTERM, None)
        return False

    monkeypatch.setattr(signals, "_has_ended", interrupted)
    assert not request._launcher_is_gone()
    monkeypatch.setattr(signals, "_has_ended", lambda process: False)
    assert request.asked


def start_waiting_process(launcher: int, **streams) -> subprocess.Popen:
    """Starts a process that watches the process id `launcher`."""
    environment = os.environ | {LAUNCHER_VARIABLE: str(launcher)}
    return subprocess.Popen([sys.executable, "-c", WAITING], env=environment, text=True, **streams)


def test_rank_without_its_launcher_exits_even_if_stderr_cannot_be_written():
    launcher = subprocess.Popen([sys.executable, "-c", ""])
    launcher.wait()
    with open("/dev/full", "w") as full:
        assert (
            start_waiting_process(launcher.pid, stderr=full, stdout=subprocess.DEVNULL).wait(timeout=30)
            == 128 + signal.SIGTERM
        )


def test_younger_process_with_the_launchers_id_is_not_the_launcher():
    younger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    request = StopRequest(False)
    request._watch(younger.pid)
    younger.kill()
    younger.wait()
    assert request.asked


def test_rank_keeps_waiting_while_its_launcher_lives():
    process = start_waiting_process(os.getpid(), stdout=subprocess.PIPE)
    assert process.stdout.readline() == "False\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2 * signals.POLL_SECONDS)
    process.kill()
    process.communicate()
