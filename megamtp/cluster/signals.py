"""Being asked to stop: by SIGTERM, SIGUSR1 or Ctrl-C, or by the death of the launcher.

DeepSpeed's launchers do not pass signals on well: SIGTERM to `deepspeed` ends it and leaves the ranks running; SIGTERM
to its per-node process reaches one rank after the other. So a rank also watches its ancestors, and the ranks agree
every step. It looks for them when this module is imported: who looks late may find them dead, and takes himself for one
that nobody launched. (So does a rank whose launcher dies while Python itself still starts; nothing tells it.)
"""

import os
import signal
import sys
import threading
from contextlib import suppress

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "mpirun", "mpiexec", "hydra_pmi_proxy")
# the number of our own launch command, which may be gone before a rank could look for it
LAUNCHER_VARIABLE = "MEGAMTP_LAUNCHER"
LOOK_SECONDS = 1.0  # between looks at the launcher, as long as there are no steps


class StopRequest:
    """Whether this rank was asked to stop."""

    def __init__(self, launched: bool):
        """`launched`: a launcher stands above this process, and its death means stop. Until `listen`, it ends the
        process.
        """
        self._received = False
        self._listening = threading.Event()
        self._watched = list(_ABOVE) if launched else []
        self._came_too_late = False  # to see our own launch command alive
        named = os.environ.get(LAUNCHER_VARIABLE)
        if named:
            self._watch(int(named))
        if self._watched or self._came_too_late:
            threading.Thread(target=self._end_with_launcher, daemon=True).start()

    def listen(self) -> None:
        """From here on, signals ask. Before, while a rank waits for its peers and has nothing to save, they end it."""
        self._listening.set()
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _end_with_launcher(self) -> None:
        """Peers may have ended, or never begun: a rank that waits for them would do so for half an hour."""
        while not self._listening.is_set():
            if self._launcher_is_gone() and not self._listening.is_set():
                with suppress(OSError):  # what it writes to may be gone with the launcher
                    print("megamtp: ends before its first step: its launcher is gone", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)
            self._listening.wait(LOOK_SECONDS)

    def _watch(self, number: int) -> None:
        """The process of this number, unless it is a later one than this, which has it by chance."""
        try:
            process = psutil.Process(number)
            older = process.create_time() <= psutil.Process().create_time()
        except psutil.NoSuchProcess:
            older = False
        if older:
            self._watched.append(process)
        else:
            self._came_too_late = True

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt  # asked twice: at once, without saving
        self._received = True

    @property
    def asked(self) -> bool:
        """True from the first signal, or the first death among the launcher's processes, on."""
        return self._received or self._launcher_is_gone()

    def _launcher_is_gone(self) -> bool:
        """Changes nothing: signals arrive, and the other thread looks, at any time."""
        return self._came_too_late or any(_ended(process) for process in self._watched)


def _ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _ancestors() -> list[psutil.Process]:
    """The launcher's processes above this one: parents as long as they run DeepSpeed, torchrun or mpirun."""
    launchers = []
    with suppress(psutil.Error):  # one that ends meanwhile, or another user's, ends the search
        process = psutil.Process().parent()
        while process and _is_launcher(process.cmdline()):
            launchers.append(process)
            process = process.parent()
    return launchers


def _is_launcher(words: list[str]) -> bool:
    """By the program's name, or the name of what Python runs; a shell, say, only speaks of launchers."""
    program, *others = map(os.path.basename, words or [""])
    if program.startswith("python"):
        program = next((word for word in others if not word.startswith("-")), "")
    return any(program == name or program.startswith(f"{name}.") for name in LAUNCHERS)


_ABOVE = _ancestors()
