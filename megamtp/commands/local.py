"""Runs a training job on this machine: the `deepspeed` launcher, with signals that arrive and no process left behind.

    bash launch/local.sh configs/quickstart.yaml train.steps=100
    python -m megamtp.commands.local configs/quickstart.yaml train.steps=100     (in an environment that is active)

SIGTERM, SIGUSR1 and Ctrl-C reach every rank, so that all save together; the job's exit status becomes this command's.
MEGAMTP_RANKS chooses the number of ranks: without, one per GPU, or two where there is none.
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
from megamtp.commands.command_line import run
from megamtp.config import print_help
from megamtp.errors import InputError

GRACE_SECONDS = 120.0
JOB_VARIABLE = "MEGAMTP_JOB"  # marks the processes of one job, also after their parents have died
PASSED_ON: dict[int, int] = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}


class Launch:
    """One launch of `module` on `num_ranks` ranks of this machine. Installs handlers of SIGTERM, SIGINT and SIGUSR1."""

    def __init__(self, module: str, arguments: list[str], num_ranks: int):
        self._module, self._name, self._received = module, uuid.uuid4().hex, 0
        for number in PASSED_ON:
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
        # A session of its own: Ctrl-C in the terminal then reaches this process alone, which passes it on in order.
        self._launcher = subprocess.Popen(
            [sys.executable, *command, "--module", module, *arguments],
            env=os.environ | {JOB_VARIABLE: self._name, LAUNCHER_VARIABLE: str(os.getpid())},
            start_new_session=True,
        )
        if self._received:
            self._pass_on()

    def wait(self) -> int:
        """The exit status of the job, or 128 + the number of the signal that ended it before it could save.

        Should the launcher die first, its ranks get SIGTERM, and after GRACE_SECONDS SIGKILL; the status is then 1 at
        least.
        """
        status = self._launcher.wait()
        orphans = self._ranks()
        if orphans:
            _end(orphans)
        number = PASSED_ON.get(self._received)
        # as Python says it, and as DeepSpeed's launcher passes it on
        if number and status in (-number, -number & 0xFF):
            return 128 + number
        return max(1, status) if orphans or status < 0 else status

    def _receive(self, number: int, frame: object) -> None:
        self._received = number
        if hasattr(self, "_launcher"):
            self._pass_on()

    def _pass_on(self) -> None:
        ranks = self._ranks()
        if ranks:
            _send(ranks, PASSED_ON[self._received])
        elif self._launcher.poll() is None:  # nothing has begun that could be saved
            os.killpg(self._launcher.pid, PASSED_ON[self._received])

    def _ranks(self) -> list[psutil.Process]:
        """The living rank processes: those that run the module itself, not the launcher's that name it."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                place = words.index(self._module) if self._module in words else 0
                is_rank = place and words[place - 1] == "-m" and "deepspeed.launcher.launch" not in words
                if is_rank and process.environ().get(JOB_VARIABLE) == self._name:
                    found.append(process)
            except psutil.Error:  # ended meanwhile, or another user's
                continue
        return found


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
    """Of a job on this machine. Raises InputError: MEGAMTP_RANKS is no number of them."""
    import torch

    given = os.environ.get("MEGAMTP_RANKS") or str(torch.cuda.device_count() or 2)
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f"MEGAMTP_RANKS={given}; expected a number of ranks")
    return int(given)


def main() -> None:
    """Counts GPUs, shares out the CPU's cores, launches megamtp.pretrain and exits with its status. Raises
    InputError.
    """
    if print_help(sys.argv, __doc__):
        return
    import torch

    ranks = num_ranks()
    if not torch.cuda.device_count():
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    sys.exit(Launch("megamtp.pretrain", sys.argv[1:], ranks).wait())


if __name__ == "__main__":
    run(main)
