"""What a program prints for its user. A training run goes on when its terminal, or the disk of its log, is gone."""

import io
import sys
from contextlib import suppress

MAX_MESSAGE = 2000  # characters of an error message, which may quote an argument of any length


def print_line(line: str) -> None:
    """Prints on stdout; does nothing where stdout cannot be written."""
    with suppress(OSError):
        print(line, flush=True)


def print_warning(warning: str) -> None:
    """Prints on stderr; does nothing where stderr cannot be written."""
    with suppress(OSError):
        print(f"megamtp: warning: {warning}", file=sys.stderr, flush=True)


def print_error(error: object) -> None:
    """Prints one line on stderr: line breaks and control characters as escapes, and without the middle of a very
    long message.
    """
    line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(error))
    if len(line) > MAX_MESSAGE:
        line = f"{line[: MAX_MESSAGE // 2]} ... {line[-MAX_MESSAGE // 2 :]}"
    with suppress(OSError):
        print(f"megamtp: error: {line}", file=sys.stderr, flush=True)


def print_all_characters() -> None:
    """Makes stdout print characters that its encoding lacks as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
