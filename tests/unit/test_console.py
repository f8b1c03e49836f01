"""Lines for the user: an error is one line, and failed writes are ignored."""

import io
import sys

import pytest

from megamtp.console import escape_unencodable_characters, print_error, print_line, print_warning
from megamtp.errors import InputError


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\nb", "a\\nb"),
        ("a\r\x1b[2Jb", "a\\r\\x1b[2Jb"),
        ("a\u2028b\x85\udcff", "a\\u2028b\\x85\\udcff"),
        ("caf\u00e9 \\n", "caf\u00e9 \\n"),
        ("a" * 5000, f"{'a' * 1000} ... {'a' * 1000}"),
    ],
)
def test_an_error_is_one_printable_line(message, line, capsys):
    print_error(InputError(message))
    assert capsys.readouterr().err == f"megamtp: error: {line}\n"


def test_lines_and_warnings(capsys):
    print_line("step 3")
    print_warning("disk is slow")
    assert tuple(capsys.readouterr()) == ("step 3\n", "megamtp: warning: disk is slow\n")


@pytest.mark.parametrize(
    ("print_message", "stream"), [(print_line, "stdout"), (print_warning, "stderr"), (print_error, "stderr")]
)
def test_printing_to_a_full_disk_raises_no_error(print_message, stream, monkeypatch):
    with open("/dev/full", "wb", buffering=0) as device:
        full = io.TextIOWrapper(device, write_through=True)
        monkeypatch.setattr(sys, stream, full)
        with pytest.raises(OSError, match="No space left"):
            full.write("message")
        print_message("message")


def test_characters_outside_the_encoding_are_printed_as_escapes(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    with pytest.raises(UnicodeEncodeError):
        print_line("caf\u00e9")
    escape_unencodable_characters()
    print_line("caf\u00e9")
    assert content.getvalue() == b"caf\\xe9\n"
