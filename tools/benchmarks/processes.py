"""Runs functions in new processes, for work that a process can do only once, such as joining a process group."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megamtp.errors import InputError

TOOLS = Path(__file__).parents[1]
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


def call(module: str, *arguments: str, log: Path | None = None, environment: dict[str, str] | None = None) -> None:
    """Runs a module of megamtp or benchmarks as a command.

    Args:
        log: file to which the command's output is appended. None: the command prints it.
        environment: further variables of the command's environment.

    Raises:
        InputError: the command failed; it has printed the reason.
    """
    path = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | {"PYTHONPATH": path} | (environment or {})
    command = [sys.executable, "-m", module, *arguments]
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") if log else nullcontext() as stream:
        status = subprocess.run(command, env=variables, stdout=stream, stderr=stream).returncode
    if status:
        printed = f"in {log}" if log else "that it printed"
        raise InputError(f"{module} ended with status {status}; expected 0: fix the error {printed}, then try again")
