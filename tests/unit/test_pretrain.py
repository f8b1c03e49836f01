"""Tests of a training that fails before it starts. tests/end_to_end runs whole trainings."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "error", ["InputError('a' + chr(10) + 'b')", "FileNotFoundError(28, 'No space left', 'a' + chr(10) + 'b')"]
)
def test_line_breaks_in_an_error_are_escaped(error):
    program = (
        "from megamtp import pretrain\nfrom megamtp.errors import InputError\ndef main(arguments):\n    raise {}\n"
    )
    program = f"{program.format(error)}pretrain.main = main\npretrain.entry()"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 2
    assert [line for line in finished.stderr.splitlines() if "a\\nb" in line] == finished.stderr.splitlines()
