"""How every command ends: whoever reads its output, and whatever became of it."""

import os
import subprocess
import sys

import pytest

from megamtp.commands.command_line import Parser
from megamtp.errors import InputError

START = "import sys; from megamtp.commands.command_line import run; from megamtp.errors import InputError\n"
SOME, MUCH = "print('some')", "print('much ' * 100_000)"


def call(body: str, stdout, **variables: str) -> tuple[int, str]:
    """(exit status, stderr) of a command with this body."""
    program = f"{START}def main():\n    {body}\nrun(main)"
    finished = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, stdout=stdout, stderr=subprocess.PIPE, text=True
    )
    return finished.returncode, finished.stderr


@pytest.fixture
def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", [SOME, MUCH, f"{SOME}; sys.exit(1)"])
def test_output_that_nobody_reads(closed_pipe, body, unbuffered):
    assert call(body, closed_pipe, PYTHONUNBUFFERED=unbuffered) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", [SOME, MUCH, f"{SOME}; sys.exit(1)"])
def test_output_without_room(body, unbuffered):
    with open("/dev/full", "w") as full:
        status, error = call(body, full, PYTHONUNBUFFERED=unbuffered)
    assert (status, error) == (
        2,
        "megamtp: error: the output cannot be written: No space left on device; make room for it\n",
    )


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("pass", 0, ""),
        ("sys.exit(1)", 1, ""),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise InputError('found this')", 2, "megamtp: error: found this\n"),
    ],
)
def test_other_ends_are_what_they_were(closed_pipe, body, status, error):
    for stdout in (closed_pipe, subprocess.DEVNULL):
        assert call(body, stdout) == (status, error)


@pytest.mark.parametrize(
    "error", ["OSError(28, 'No space left', 'file')", "OSError(21, 'Is a directory')", "RuntimeError()"]
)
def test_a_defect_keeps_its_traceback(error):
    status, shown = call(f"raise {error}", subprocess.DEVNULL)
    assert status == 1 and shown.startswith("Traceback")


def test_two_hyphens_as_the_value_of_an_option(monkeypatch):
    parser = Parser("")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--text")
    parser.add_argument("--texts", nargs="+")
    parser.add_argument("--number", type=int)
    parser.add_argument("--choice", choices=["a"])
    monkeypatch.setattr(sys, "argv", ["command", "word", "--text=--", "--texts=--"])
    for parse in (parser.parse_args, parser.parse_intermixed_args):
        parsed = parse()
        assert (parsed.text, parsed.texts, parsed.words) == ("--", ["--"], ["word"])
    for option, words in (("--number=--", "invalid int value: '--'"), ("--choice=--", "invalid choice: '--'")):
        for parse in (parser.parse_args, parser.parse_intermixed_args):
            with pytest.raises(InputError, match=words):
                parse([option])
