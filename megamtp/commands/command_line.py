"""How every command reports an error of its user: one line on stderr, exit status 2, no traceback."""

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from megamtp.errors import InputError

OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Parser(argparse.ArgumentParser):
    """An argument parser that describes the command by its module's docstring and raises InputError for wrong arguments."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def run(main: Callable[[], None]) -> None:
    """Calls `main`, and ends the process unless all went well.

    An InputError, or output that there is no room for, is one line on stderr and exit status 2. As shells report it, the status
    is 130 after Ctrl-C, and 141 where nobody reads the output any more.
    """
    print_all_characters()
    try:
        status = _status(main)
        print(end="", flush=True)
    except OSError as error:
        if error.filename or error.errno not in OUTPUT_ERRORS:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python will try to write the rest once more
        status = 128 + signal.SIGPIPE
        if error.errno != errno.EPIPE:
            print(f"megamtp: error: the output cannot be written: {error.strerror}; make room for it", file=sys.stderr)
            status = 2
    if status:
        sys.exit(status)


def print_all_characters() -> None:
    """From here on, those that the terminal's encoding lacks are printed as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _status(main: Callable[[], None]) -> int | str | None:
    try:
        main()
    except SystemExit as error:
        return error.code
    except InputError as error:
        print(f"megamtp: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
