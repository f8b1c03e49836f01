"""The house rules that a tool can check: imports run downward, style, types, and nothing unexpected at the top
level.
"""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOP_LEVEL = {
    "megamtp",
    "launch",
    "configs",
    "tools",
    "tests",
    "setup.py",
    "README.md",
    "LICENSE",
    "pyproject.toml",
    "requirements.lock",
}


@pytest.mark.timeout(900)  # mypy without a cache takes minutes on a slow machine
@pytest.mark.parametrize(
    "command", [["lint-imports", "--no-cache"], ["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
)
def test_tool_is_content(command):
    finished = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_top_level_holds_what_it_should():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {name.split("/")[0] for name in listed.stdout.splitlines() if name and not name.startswith(".")}
    assert found == TOP_LEVEL


def test_no_two_classes_share_a_name():
    files = [path for folder in ("megamtp", "tools") for path in (ROOT / folder).rglob("*.py")]
    names = [
        node.name for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    ]
    assert len(names) > 100
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_files_and_functions_are_short():
    files = {path: path.read_text() for path in (ROOT / "megamtp").rglob("*.py")}
    long_files = [path.name for path, text in files.items() if len(text.splitlines()) > 350]
    assert long_files == []
    long_functions = [
        f"{path.name}: {node.name}"
        for path, text in files.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 50
    ]
    assert long_functions == []
    assert len([path for path in files if path.parent == ROOT / "megamtp/engines"]) <= 14
