"""Runs functions in new processes, for work that a process can do only once, such as joining a process group."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megamtp.errors import InputError

SPAWN = multiprocessing.get_context("spawn")


class ProcessCall:
    """A function call in a new process.

    The process starts and imports its modules at once, so that another process can measure meanwhile. It calls the
    function only in `run`.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._connection, child_connection = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(child_connection, function, arguments), daemon=True)
        self._process.start()
        child_connection.close()

    def run(self) -> Any:
        """Calls the function, waits for it and returns its result.

        Raises:
            InputError: the function raised it.
            RuntimeError: the function raised another error, which is on stderr, or the process died.
        """
        try:
            self._connection.send(None)
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"the measuring process ended with status {self._process.exitcode}") from None
        self._process.join()
        if isinstance(answer, InputError):
            raise answer
        return answer


def _serve(connection: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    connection.recv()
    try:
        answer = function(*arguments)
    except InputError as error:
        answer = error
    connection.send(answer)


def call(module: str, *arguments: str) -> None:
    """Runs a module of megamtp as a command. Raises InputError if it fails; the command prints the reason."""
    status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if status:
        raise InputError(
            f"{module} ended with status {status}; expected 0: fix the error that it printed, then try again"
        )
