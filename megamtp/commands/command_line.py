"""How every command reports an error of its user: one line on stderr, exit status 2, no traceback."""

import sys
from collections.abc import Callable

from megamtp.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Calls `main`; an InputError is printed as one line on stderr and ends the process with exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"megamtp: error: {error}", file=sys.stderr)
        sys.exit(2)
