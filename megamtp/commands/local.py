"""Runs a training job on this machine with the `deepspeed` launcher. Forwards signals and leaves no process behind.

    %(prog)s configs/quickstart.yaml train.steps=100

SIGTERM, SIGUSR1 and Ctrl-C reach every rank: all ranks save together, and this command exits with the job's status.
MEGAMTP_RANKS sets the number of ranks. The default is one rank per GPU, or two ranks on a machine without a GPU.
"""

import os
import signal
import subprocess
import sys
import time
import uuid

import psutil

from megamtp.cluster.ports import reserve_port
from megamtp.cluster.signals import LAUNCHER_VARIABLE
from megamtp.commands.command_line import command_as_called, run
from megamtp.config import print_help
from megamtp.errors import InputError

GRACE_SECONDS = 120.0
JOB_VARIABLE = "MEGAMTP_JOB"  # identifies the processes of one job, even after their parents have ended
FORWARDED_AS: dict[int, int] = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}


class Launch:
    """One launch of a module on several ranks of this machine."""

    def __init__(self, module: str, arguments: list[str], num_ranks: int):
        """Starts the launcher, and installs handlers of SIGTERM, SIGINT and SIGUSR1 that forward them to the ranks."""
        self._module, self._job_id, self._received = module, uuid.uuid4().hex, 0
        for number in FORWARDED_AS:
            signal.signal(number, self._receive)
        command = [
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            str(num_ranks),
            "--master_port",
            str(reserve_port()),
            "--quiet",
        ]
        # In its own session, the launcher does not get Ctrl-C from the terminal; this process forwards it instead.
        self._launcher = subprocess.Popen(
            [sys.executable, *command, "--module", module, *arguments],
            env=os.environ | {JOB_VARIABLE: self._job_id, LAUNCHER_VARIABLE: str(os.getpid())},
            start_new_session=True,
        )
        if self._received:  # a signal arrived while the launcher was started
            self._forward_signal()

    def wait(self) -> int:
        """Waits for the job. Returns its exit status, or 128 + the signal that ended it before it could save.

        If the launcher ends before its ranks, they get SIGTERM and, after GRACE_SECONDS, SIGKILL. The status is then at
        least 1.
        """
        status = self._launcher.wait()
        orphans = self._ranks()
        if orphans:
            _end(orphans)
        number = FORWARDED_AS.get(self._received)
        # Python reports a process ended by a signal as -number, and DeepSpeed's launcher exits with that modulo 256.
        if number and status in (-number, -number & 0xFF):
            return 128 + number
        return max(1, status) if orphans or status < 0 else status

    def _receive(self, number: int, frame: object) -> None:
        self._received = number
        if hasattr(self, "_launcher"):
            self._forward_signal()

    def _forward_signal(self) -> None:
        ranks = self._ranks()
        if ranks:
            _send(ranks, FORWARDED_AS[self._received])
        elif self._launcher.poll() is None:  # no rank has started, so there is nothing to save
            os.killpg(self._launcher.pid, FORWARDED_AS[self._received])

    def _ranks(self) -> list[psutil.Process]:
        """Returns the running rank processes of this job. (The arguments of the launcher also have the module.)"""
        ranks = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                position = words.index(self._module) if self._module in words else 0
                is_rank = position and words[position - 1] == "-m" and "deepspeed.launcher.launch" not in words
                if is_rank and process.environ().get(JOB_VARIABLE) == self._job_id:
                    ranks.append(process)
            except psutil.Error:  # the process has just ended, or belongs to another user
                continue
        return ranks


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _end(processes: list[psutil.Process]) -> None:
    _send(processes, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(process.is_running() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    _send(processes, signal.SIGKILL)


def num_ranks() -> int:
    """Returns the number of ranks of a job on this machine.

    Raises:
        InputError: MEGAMTP_RANKS is not a number of ranks.
    """
    import torch

    text = os.environ.get("MEGAMTP_RANKS") or str(torch.cuda.device_count() or 2)
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"MEGAMTP_RANKS={text}; expected a number of ranks, 1 or more: correct or unset it")
    return int(text)


def main() -> None:
    """Launches megamtp.pretrain and exits with its status. CPU ranks share the cores. Raises InputError."""
    if print_help(sys.argv, __doc__.replace("%(prog)s", command_as_called())):
        return
    import torch

    ranks = num_ranks()
    if not torch.cuda.device_count():
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    sys.exit(Launch("megamtp.pretrain", sys.argv[1:], ranks).wait())


if __name__ == "__main__":
    run(main)
