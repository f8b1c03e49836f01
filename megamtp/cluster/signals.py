"""Receives requests to stop a job: SIGTERM, SIGUSR1, Ctrl-C, or the end of the launcher.

DeepSpeed's launchers do not forward signals reliably. SIGTERM to `deepspeed` ends it and leaves the ranks running;
SIGTERM to its per-node process reaches one rank after another. Each rank therefore also watches its ancestors. In
every step an all-reduce counts the ranks that were asked to stop.

Importing this module looks up the ancestors. A later lookup could miss a launcher that has already ended, and the rank
would then run on without a launcher. (This still happens if the launcher ends while Python itself starts.)
"""

import os
import signal
import sys
import threading
from contextlib import suppress

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "mpirun", "mpiexec", "hydra_pmi_proxy")
# The process id of megamtp's own launch command, which may end before a rank can look it up among its ancestors.
LAUNCHER_VARIABLE = "MEGAMTP_LAUNCHER"
POLL_SECONDS = 1.0  # time between checks of the launcher until `listen` is called


class StopRequest:
    """Records whether this rank was asked to stop."""

    def __init__(self, has_launcher: bool):
        """Starts to watch the launcher. Until `listen` is called, this process ends if the launcher ends.

        Args:
            has_launcher: whether a launcher started this process. The end of the launcher is then a request to stop.
        """
        self._received = False
        self._listening = threading.Event()
        self._watched = list(_LAUNCHER_PROCESSES) if has_launcher else []
        self._launch_command_is_gone = False  # it ended before this process could look it up
        launch_command = os.environ.get(LAUNCHER_VARIABLE)
        if launch_command:
            self._watch(int(launch_command))
        if self._watched or self._launch_command_is_gone:
            threading.Thread(target=self._exit_with_launcher, daemon=True).start()

    def listen(self) -> None:
        """Installs handlers that turn signals into stop requests.

        Before this call a signal ends the process, because a rank that waits for its peers has nothing to save.
        """
        self._listening.set()
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _exit_with_launcher(self) -> None:
        """Exits if the launcher ends before `listen`: a wait for peers that have also ended takes half an hour."""
        while not self._listening.is_set():
            if self._launcher_is_gone() and not self._listening.is_set():
                with suppress(OSError):  # stderr may have been closed with the launcher
                    print("megamtp: exits before its first step: its launcher is gone", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)
            self._listening.wait(POLL_SECONDS)

    def _watch(self, process_id: int) -> None:
        """Watches a process. If it started after this process, it only has the same id as a launcher that has ended."""
        try:
            process = psutil.Process(process_id)
            is_launcher = process.create_time() <= psutil.Process().create_time()
        except psutil.NoSuchProcess:
            is_launcher = False
        if is_launcher:
            self._watched.append(process)
        else:
            self._launch_command_is_gone = True

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt  # a second Ctrl-C ends the process at once, without saving
        self._received = True

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived or one of the launcher's processes has ended."""
        return self._received or self._launcher_is_gone()

    def _launcher_is_gone(self) -> bool:
        """Returns whether a launcher process has ended. Changes no state, so signals may interrupt it."""
        return self._launch_command_is_gone or any(_has_ended(process) for process in self._watched)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _find_launcher_processes() -> list[psutil.Process]:
    """Returns the launcher's processes: the consecutive ancestors that run DeepSpeed, torchrun or mpirun."""
    launchers = []
    with suppress(psutil.Error):  # the search ends at a process that has just ended or that another user owns
        process = psutil.Process().parent()
        while process and _is_launcher(process.cmdline()):
            launchers.append(process)
            process = process.parent()
    return launchers


def _is_launcher(words: list[str]) -> bool:
    """Returns whether a command line runs a launcher, as a program or as a module or script of Python.

    Other words do not count: a shell may have a launcher's name among its arguments.
    """
    program, *others = map(os.path.basename, words or [""])
    if program.startswith("python"):
        program = next((word for word in others if not word.startswith("-")), "")
    return any(program == name or program.startswith(f"{name}.") for name in LAUNCHERS)


_LAUNCHER_PROCESSES = _find_launcher_processes()
