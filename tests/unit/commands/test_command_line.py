"""Tests the shared command line: --help, exit statuses, errors in one line, and output that cannot be written."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.command import BENCHMARKS
from benchmarks.command import main as run_benchmark

from megamtp.commands.command_line import Parser
from megamtp.errors import InputError
from tests.cases import ROOT

START = "import sys; from megamtp.commands.command_line import run; from megamtp.errors import InputError\n"
SOME, MUCH = "print('some')", "print('much ' * 100_000)"

# The ways to call each command: as a module, as a script and as an installed command. None: there is no such way.
WAYS = {
    "megamtp.pretrain": ("python -m megamtp.pretrain", None, "megamtp-pretrain"),
    "megamtp.commands.local": ("python -m megamtp.commands.local", None, None),
    "megamtp.commands.plan": ("python -m megamtp.commands.plan", "python tools/plan.py", "megamtp-plan"),
    "megamtp.commands.report": ("python -m megamtp.commands.report", "python tools/report.py", "megamtp-report"),
    "megamtp.commands.generate": (
        "python -m megamtp.commands.generate",
        "python tools/generate.py",
        "megamtp-generate",
    ),
    "megamtp.commands.prepare_data": (
        "python -m megamtp.commands.prepare_data",
        "python tools/prepare_data.py",
        "megamtp-prepare-data",
    ),
    "megamtp.commands.convert_checkpoint": (
        "python -m megamtp.commands.convert_checkpoint",
        "python tools/convert_checkpoint.py",
        "megamtp-convert",
    ),
    "hash_training": (None, "python tools/hash_training.py", None),
}


@pytest.fixture
def help_of(monkeypatch, capsys):
    """help_of(main, way) -> what `main` prints for --help when the command is called as `way`."""

    def help_text(main, way: str) -> str:
        *python, last = way.split()
        specification = importlib.util.find_spec(last) if "-m" in python else None
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", specification)
        program = last if python else f"/opt/bin/{last}"
        monkeypatch.setattr(sys, "argv", [specification.origin if specification else program, "--help"])
        try:
            main()
        except SystemExit as error:
            assert error.code == 0
        output, errors = capsys.readouterr()
        assert errors == ""
        return output

    return help_text


@pytest.mark.parametrize("module", WAYS)
def test_help_names_the_command_as_it_was_called(module, help_of):
    main = importlib.import_module(module).main
    ways = [way for way in WAYS[module] if way]
    for way in ways:
        text = help_of((lambda: main(["--help"])) if module == "megamtp.pretrain" else main, way)
        assert f"\n    {way} " in text and "%(" not in text
        assert [other for other in ways if other != way and other in text] == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_of_a_benchmark_names_it(name, help_of, monkeypatch):
    def main() -> None:
        monkeypatch.setattr(sys, "argv", [sys.argv[0], name, "--help"])
        run_benchmark()

    text = help_of(main, "python tools/benchmark.py")
    assert f"usage: python tools/benchmark.py {name} " in text and "%(" not in text
    assert re.search(rf"^    (?!  ).*tools/benchmark\.py {name}\b", text, re.MULTILINE)  # in an example


def test_help_of_a_command_called_in_three_ways(tmp_path):
    """In real processes, with the script that pip writes for an entry point."""
    installed = tmp_path / "megamtp-plan"
    installed.write_text("import sys\nfrom megamtp.commands.plan import entry\nsys.exit(entry())\n")
    calls = {
        "megamtp-plan": [str(installed)],
        "python tools/plan.py": ["tools/plan.py"],
        "python -m megamtp.commands.plan": ["-m", "megamtp.commands.plan"],
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for way, arguments in calls.items():
        command = [sys.executable, *arguments, "--help"]
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.startswith(f"usage: {way} [-h] --gpus")
        assert finished.stdout.count(f"\n    {way} configs/") == 3
        wrong = subprocess.run(command[:-1], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr.endswith(f"; see {way} --help\n")


def test_help_of_the_local_launch_script_names_the_script(tmp_path):
    """With an environment.sh that installs nothing."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch/local.sh", tmp_path / "launch")
    (tmp_path / "launch/environment.sh").write_text(f"cd '{ROOT}'\n")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "launch/local.sh", "--help"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "\n    bash launch/local.sh configs/" in finished.stdout
    assert "megamtp.commands.local" not in finished.stdout


def call(body: str, stdout, **variables: str) -> tuple[int, str]:
    """Runs a command with this body. Returns its exit status and stderr."""
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
def test_closed_output_is_status_141(closed_pipe, body, unbuffered):
    assert call(body, closed_pipe, PYTHONUNBUFFERED=unbuffered) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", [SOME, MUCH, f"{SOME}; sys.exit(1)"])
def test_output_on_a_full_disk_is_one_line_and_status_2(body, unbuffered):
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
def test_other_exit_statuses_do_not_depend_on_the_output(closed_pipe, body, status, error):
    for stdout in (closed_pipe, subprocess.DEVNULL):
        assert call(body, stdout) == (status, error)


@pytest.mark.parametrize(
    "error", ["OSError(28, 'No space left', 'file')", "OSError(21, 'Is a directory')", "RuntimeError()"]
)
def test_unexpected_error_keeps_its_traceback(error):
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
