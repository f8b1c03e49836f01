"""Prints lines for the user. Failed writes are ignored: training continues without a terminal or log disk."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

MAX_ERROR_CHARACTERS = 2000  # error messages quote arguments, which may be of any length


def print_line(line: str) -> None:
    """Prints a line on stdout; does nothing if stdout cannot be written."""
    with suppress(OSError):
        print(line, flush=True)


def print_warning(warning: str) -> None:
    """Prints a warning on stderr; does nothing if stderr cannot be written."""
    with suppress(OSError):
        print(f"megamtp: warning: {warning}", file=sys.stderr, flush=True)


def print_error(error: object) -> None:
    """Prints an error as one line on stderr.

    Line breaks and control characters are printed as escapes. A message longer than MAX_ERROR_CHARACTERS loses its
    middle.
    """
    line = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(error)
    )
    if len(line) > MAX_ERROR_CHARACTERS:
        line = f"{line[: MAX_ERROR_CHARACTERS // 2]} ... {line[-MAX_ERROR_CHARACTERS // 2 :]}"
    with suppress(OSError):
        print(f"megamtp: error: {line}", file=sys.stderr, flush=True)


def discard_output(stream: TextIO) -> None:
    """Sends the stream to /dev/null. Python writes unwritten output again at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def escape_unencodable_characters() -> None:
    """Makes stdout print escapes for characters that its encoding cannot represent, instead of raising."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
