"""How every command reports an error of its user: one line on stderr, exit status 2, no traceback."""

import argparse
import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from megamtp.console import escape_unencodable_characters, print_error
from megamtp.errors import InputError

OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Parser(argparse.ArgumentParser):
    """An argument parser that describes the command by its module's docstring and raises InputError for wrong
    arguments.
    """

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The value of `--option=--` is `--`, as Python 3.13 reads it; earlier versions drop it and leave an empty
        list.
        """
        if action.option_strings and action.nargs in (None, argparse.ONE_OR_MORE) and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value if action.nargs is None else [value]
        return super()._get_values(action, arg_strings)


def run(main: Callable[[], None]) -> None:
    """Calls `main`, and ends the process unless all went well.

    An InputError, or output that there is no room for, is one line on stderr and exit status 2. As shells report it,
    the status is 130 after Ctrl-C, and 141 where nobody reads the output any more.
    """
    escape_unencodable_characters()
    try:
        status = _status(main)
        print(end="", flush=True)
    except OSError as error:
        if error.filename or error.errno not in OUTPUT_ERRORS:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python will try to write the rest once more
        status = 128 + signal.SIGPIPE
        if error.errno != errno.EPIPE:
            print_error(f"the output cannot be written: {error.strerror}; make room for it")
            status = 2
    if status:
        sys.exit(status)


def ignore_deprecated_collectives() -> None:
    """DeepSpeed calls collectives by names that torch 2.13 deprecates. No user can do anything about these warnings."""
    names = "all_gather_into_tensor|reduce_scatter_tensor"
    warnings.filterwarnings("ignore", rf"`torch\.distributed\.({names})` is deprecated", FutureWarning)


def _status(main: Callable[[], None]) -> int | str | None:
    try:
        main()
    except SystemExit as error:
        return error.code
    except InputError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
