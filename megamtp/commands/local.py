"""Runs a training job on this machine: the `deepspeed` launcher, with signals that arrive and no process left behind.

    python -m megamtp.commands.local configs/quickstart.yaml train.steps=100

SIGTERM, SIGUSR1 and Ctrl-C reach every rank, so that all save together; the job's exit status becomes this command's.
MEGAMTP_RANKS chooses the number of ranks: without, one per GPU, or two where there is none.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid

import psutil

from megamtp.commands.command_line import run
from megamtp.errors import InputError

GRACE_SECONDS = 120.0
JOB_VARIABLE = "MEGAMTP_JOB"  # marks the processes of one job, also after their parents have died


def launch(module: str, arguments: list[str], num_ranks: int, grace_seconds: float = GRACE_SECONDS) -> int:
    """Runs `module` on `num_ranks` ranks of this machine and returns its exit status.

    Should the launcher die first, its ranks get SIGTERM, and after `grace_seconds` SIGKILL; the status is then 1 at least.
    Installs handlers of SIGTERM, SIGINT and SIGUSR1.
    """
    job = uuid.uuid4().hex
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks), "--master_port", str(_free_port())]
    # A session of its own: Ctrl-C in the terminal then reaches this process alone, which passes it on in order.
    launcher = subprocess.Popen(
        [*command, "--quiet", "--module", module, *arguments], env=os.environ | {JOB_VARIABLE: job}, start_new_session=True
    )
    for received, passed_on in (
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
    ):
        signal.signal(received, lambda *_, number=passed_on: _send(_ranks(job, module), number))
    status = launcher.wait()
    orphans = _ranks(job, module)
    if orphans:
        _end(orphans, grace_seconds)
        return max(1, status)
    return status if status >= 0 else 128 - status


def _ranks(job: str, module: str) -> list[psutil.Process]:
    """The living rank processes of a job: those that run the module itself, not the launcher's that name it."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            is_rank = module in words and words[words.index(module) - 1] == "-m" and "deepspeed.launcher.launch" not in words
            if is_rank and process.environ().get(JOB_VARIABLE) == job:
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


def _end(processes: list[psutil.Process], grace_seconds: float) -> None:
    _send(processes, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while any(process.is_running() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    _send(processes, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def main() -> int:
    """Counts GPUs, shares out the CPU's cores, launches megamtp.pretrain and returns its exit status. Raises InputError."""
    import torch

    num_gpus = torch.cuda.device_count()
    given = os.environ.get("MEGAMTP_RANKS") or str(num_gpus or 2)
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f"MEGAMTP_RANKS={given}; expected a number of ranks")
    num_ranks = int(given)
    if not num_gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    return launch("megamtp.pretrain", sys.argv[1:], num_ranks)


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
