"""Being asked to stop: by SIGTERM or SIGUSR1, or by the death of the launcher.

DeepSpeed's launchers do not pass signals on well: SIGTERM to `deepspeed` ends it and leaves the ranks running; SIGTERM to its
per-node process reaches one rank after the other. So a rank also watches its ancestors, and the ranks agree every step.
"""

import os
import signal

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this rank was asked to stop. Signal handlers are installed by the constructor."""

    def __init__(self, launched: bool):
        """`launched`: a launcher stands above this process, and its death means stop."""
        self._received = False
        self._ancestors = _ancestors() if launched else []
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self._received = True

    @property
    def asked(self) -> bool:
        """True from the first signal, or the first death among the launcher's processes, on."""
        if not self._received and self._ancestors:
            self._received = any(_ended(process) for process in self._ancestors)
        return self._received


def _ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _ancestors() -> list[psutil.Process]:
    """The launcher's processes above this one: parents as long as they run DeepSpeed, torchrun or mpirun."""
    launchers = []
    for process in psutil.Process(os.getpid()).parents():
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            break
        if not any(name in words for name in ("deepspeed", "torchrun", "torch.distributed", "mpirun", "mpiexec", "megamtp")):
            break
        launchers.append(process)
    return launchers
