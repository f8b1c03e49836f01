"""How every command reports an error of its user: one line on stderr, exit status 2, no traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from megamtp.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser that describes the command by its module's docstring and raises InputError for wrong arguments."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def run(main: Callable[[], None]) -> None:
    """Calls `main`; an InputError is printed as one line on stderr and ends the process with exit status 2; Ctrl-C with 130."""
    try:
        main()
    except InputError as error:
        print(f"megamtp: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells report a process that Ctrl-C has ended
