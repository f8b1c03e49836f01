"""The house rules that a tool can check: imports run downward, style, types, where tests and top-level files lie."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tests/unit"
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


def names_its_tests(path: Path) -> bool:
    """Whether the module's docstring has a line "Tests: PATH, PATH." of tests that exist."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    named = re.findall(r"^Tests: (.+)\.$", docstring, re.MULTILINE)
    return bool(named) and all((ROOT / place).is_file() for line in named for place in line.split(", "))


def test_tests_mirror_the_tree():
    """a/b.py has tests/unit/a/test_b.py, or says in its docstring where it is tested."""
    folders = {ROOT / "megamtp": UNIT, ROOT / "tools/benchmarks": UNIT / "tools/benchmarks"}
    modules = [(path, tests / path.relative_to(root)) for root, tests in folders.items() for path in root.rglob("*.py")]
    untested = [
        str(path.relative_to(ROOT))
        for path, mirrored in modules
        if path.name != "__init__.py" and not mirrored.with_name(f"test_{path.name}").exists()
        if not names_its_tests(path)
    ]
    assert len(modules) > 100
    assert untested == []


def test_folders_of_unit_tests_are_folders_of_the_tree():
    folders = [path.parent.relative_to(UNIT) for path in UNIT.rglob("test_*.py")]
    assert len(folders) > 100
    missing = [str(each) for each in folders if not any((root / each).is_dir() for root in (ROOT / "megamtp", ROOT))]
    assert missing == []


def test_init_files_hold_no_code():
    """So that they need no tests: names are imported there, and nothing is defined."""
    definitions = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for folder in ("megamtp", "tools")
        for path in (ROOT / folder).rglob("__init__.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert definitions == []


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
