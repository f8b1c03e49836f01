"""Being asked to stop: by SIGTERM, SIGUSR1 or Ctrl-C, or by the death of the launcher.

DeepSpeed's launchers do not pass signals on well: SIGTERM to `deepspeed` ends it and leaves the ranks running; SIGTERM to its
per-node process reaches one rank after the other. So a rank also watches its ancestors, and the ranks agree every step. It looks
for them when this module is imported: who looks late may find them dead, and takes himself for one that nobody launched.
"""

import os
import signal
import sys
import threading

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHERS = ("deepspeed.launcher", "bin/deepspeed", "torchrun", "torch.distributed", "mpirun", "mpiexec", "hydra_pmi_proxy")
LAUNCHER_VARIABLE = "MEGAMTP_LAUNCHER"  # names our own launch command, which may be gone before a rank could look for it
LOOK_SECONDS = 1.0  # between looks at the launcher, as long as there are no steps


def identity(pid: int) -> str:
    """A living process, told apart from later ones of the same number."""
    return f"{pid}:{psutil.Process(pid).create_time()}"


class StopRequest:
    """Whether this rank was asked to stop."""

    def __init__(self, launched: bool):
        """`launched`: a launcher stands above this process, and its death means stop. Until `listen`, it ends the process."""
        self._received = False
        self._listening = threading.Event()
        self._watched = list(_ABOVE) if launched else []
        named = os.environ.get(LAUNCHER_VARIABLE)
        if named:
            self._watch(named)
        if self._watched or self._received:
            threading.Thread(target=self._end_with_launcher, daemon=True).start()

    def listen(self) -> None:
        """From here on, signals ask. Before, while a rank waits for its peers and has nothing to save, they end it."""
        self._listening.set()
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _end_with_launcher(self) -> None:
        """Peers may have ended, or never begun: a rank that waits for them would do so for half an hour."""
        while not self._listening.is_set():
            if self.asked:
                print("megamtp: ends before its first step: its launcher is gone", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)
            self._listening.wait(LOOK_SECONDS)

    def _watch(self, named: str) -> None:
        pid = int(named.partition(":")[0])
        if psutil.pid_exists(pid) and identity(pid) == named:
            self._watched.append(psutil.Process(pid))
        else:
            self._received = True

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt  # asked twice: at once, without saving
        self._received = True

    @property
    def asked(self) -> bool:
        """True from the first signal, or the first death among the launcher's processes, on."""
        if not self._received and self._watched:
            self._received = any(_ended(process) for process in self._watched)
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
        if not any(name in words for name in LAUNCHERS):
            break
        launchers.append(process)
    return launchers


_ABOVE = _ancestors()
