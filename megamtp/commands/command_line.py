"""Parses the arguments of commands, and reports a user's error as one line on stderr with exit status 2."""

import argparse
import errno
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from megamtp.console import discard_output, escape_unencodable_characters, print_error
from megamtp.errors import InputError

OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A shell script that calls a command, such as launch/local.sh, sets this variable to its own name.
COMMAND_VARIABLE = "MEGAMTP_COMMAND"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError for wrong arguments."""

    def __init__(self, description: str):
        """
        Args:
            description: the command's docstring. `%(prog)s` in it becomes the command as it was called.
        """
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=command_as_called(), description=description, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Reads the value of `--option=--` as `--`. Before Python 3.13 argparse returns an empty list for it."""
        if action.option_strings and action.nargs in (None, argparse.ONE_OR_MORE) and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value if action.nargs is None else [value]
        return super()._get_values(action, arg_strings)


def command_as_called() -> str:
    """Returns the words that called this program.

    These are `python tools/plan.py` for a script, `megamtp-plan` for an installed command and
    `python -m megamtp.commands.plan` for a module.
    """
    if COMMAND_VARIABLE in os.environ:
        return os.environ[COMMAND_VARIABLE]
    specification = sys.modules["__main__"].__spec__
    if specification:
        return f"python -m {specification.name}"
    if sys.argv[0].endswith(".py"):
        return shlex.join(["python", sys.argv[0]])
    return os.path.basename(sys.argv[0])


def run(main: Callable[[], int | None]) -> None:
    """Calls `main`, and ends the process if its exit status is not 0. `main` may return a status.

    An InputError, or a full disk under the output, becomes one line on stderr and status 2. As in shells, the status is
    130 after Ctrl-C, and 141 if the reader of the output has ended (`| head`).
    """
    escape_unencodable_characters()
    try:
        status = _status(main)
        print(end="", flush=True)
    except OSError as error:
        if error.filename or error.errno not in OUTPUT_ERRORS:
            raise
        discard_output(sys.stdout)
        status = 128 + signal.SIGPIPE
        if error.errno != errno.EPIPE:
            print_error(f"the output cannot be written: {error.strerror}; make room for it")
            status = 2
    if status:
        sys.exit(status)


def ignore_deprecated_collectives() -> None:
    """Hides torch 2.13's warnings about collectives that DeepSpeed calls by their old names."""
    names = "all_gather_into_tensor|reduce_scatter_tensor"
    warnings.filterwarnings("ignore", rf"`torch\.distributed\.({names})` is deprecated", FutureWarning)


def _status(main: Callable[[], int | None]) -> int | str | None:
    try:
        return main()
    except SystemExit as error:
        return error.code
    except InputError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
