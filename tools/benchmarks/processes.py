"""Work in a process of its own: for what a process can do only once, such as being one of W ranks, or compiling."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megamtp.errors import InputError

SPAWN = multiprocessing.get_context("spawn")


class Fresh:
    """A call whose process imports what it needs at once, but calls only when its result is asked for.

    So one process can wait, ready, while another measures.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._connection, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(theirs, function, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def result(self) -> Any:
        """What the function returns.

        Raises:
            InputError: the function raised it.
            RuntimeError: it raised something else, which is on stderr, or its process died.
        """
        try:
            self._connection.send(None)
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"the process that measured ended with status {self._process.exitcode}") from None
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
    """A command of ours. Raises InputError: it failed, and has said why."""
    status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if status:
        raise InputError(f"{module} ended with status {status}; mend what it said and call again")
