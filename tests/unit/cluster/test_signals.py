"""Whom a rank takes for its launcher, and what it does when that is gone."""

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
def test_a_launcher_is_known_by_what_it_runs(command, expected):
    assert signals._is_launcher(command.split()) == expected


def test_a_shell_that_speaks_of_a_launcher_is_none():
    assert not signals._is_launcher(["bash", "-c", "torchrun -m megamtp.pretrain & sleep 1"])


def test_a_signal_amid_a_look_at_the_launcher_is_kept(monkeypatch):
    request = StopRequest(False)
    request._watched = [None]

    def interrupted(process: None) -> bool:
        request._receive(signal.SIGTERM, None)
        return False

    monkeypatch.setattr(signals, "_ended", interrupted)
    assert not request._launcher_is_gone()
    monkeypatch.setattr(signals, "_ended", lambda process: False)
    assert request.asked


def waiting(launcher: int, **streams) -> subprocess.Popen:
    environment = os.environ | {LAUNCHER_VARIABLE: str(launcher)}
    return subprocess.Popen([sys.executable, "-c", WAITING], env=environment, text=True, **streams)


def test_a_rank_without_its_launcher_ends_where_nobody_reads_its_errors():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with open("/dev/full", "w") as full:
        assert waiting(gone.pid, stderr=full, stdout=subprocess.DEVNULL).wait(timeout=30) == 128 + signal.SIGTERM


def test_a_process_of_the_launchers_number_that_came_later_is_not_it():
    later = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    request = StopRequest(False)
    request._watch(later.pid)
    later.kill()
    later.wait()
    assert request.asked


def test_a_rank_waits_on_while_its_launcher_lives():
    process = waiting(os.getpid(), stdout=subprocess.PIPE)
    assert process.stdout.readline() == "False\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2 * signals.LOOK_SECONDS)
    process.kill()
    process.communicate()
