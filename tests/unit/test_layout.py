"""The house rules that a tool can check: imports, style, types, where files lie; and that CONTRIBUTING.md is true."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from megamtp.config import OptimizerConfig
from tests.cases import small_config

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "tests/unit"
BIN = Path(sys.executable).parent
TOOLS = [["lint-imports", "--no-cache"], ["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
CONTRIBUTING = (ROOT / ".github/CONTRIBUTING.md").read_text()
PROSE = re.sub(r"```.*?```", "", CONTRIBUTING, flags=re.DOTALL)
CODE_BLOCKS = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
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
@pytest.mark.parametrize("command", TOOLS, ids=" ".join)
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


def test_hooks_before_a_commit_run_the_same_tools():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"].split() for hook in repository["hooks"]] == [
        [f".venv/bin/{name}", *arguments] for name, *arguments in TOOLS
    ]
    assert {(hook["language"], hook["pass_filenames"]) for hook in repository["hooks"]} == {("system", False)}


def test_contract_about_deepspeed_covers_every_module():
    """All but `megamtp.engines.deepspeed`: import-linter takes no pattern that leaves one package out."""
    inner = [path for path in (ROOT / "megamtp/engines").iterdir() if path.suffix == ".py"]
    outer = [path for path in (ROOT / "megamtp").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (*inner, *outer)}
    contract = (ROOT / "pyproject.toml").read_text().split('name = "One door to DeepSpeed"')[1]
    covered = re.findall(r'"(megamtp[\w.]*)"', contract.split("forbidden_modules")[0])
    packages = {"megamtp.__init__", "megamtp.engines", "megamtp.engines.__init__"}
    assert sorted(covered) == sorted(modules - packages)


def named_paths(text: str) -> list[str]:
    """Returns the words that are paths: they have a slash, or the suffix of a file."""
    pattern = r"[\w.-]+(/[\w.-]*)+|[\w.-]+\.(py|md|toml|lock|sh|yaml)"
    return [word for word in text.split() if re.fullmatch(pattern, word)]


def code_spans(text: str) -> str:
    """Returns the text in single backquotes."""
    return " ".join(re.findall(r"`([^`\n]+)`", text))


def test_paths_in_contributing_exist():
    """From the root of the repository. NAME is a file to be made: its folder exists."""
    commands = " ".join(re.findall(r"```\n(.*?)```", CONTRIBUTING, re.DOTALL))
    paths = named_paths(code_spans(PROSE) + " " + commands)
    assert len(set(paths)) > 50 and "launch/environment.sh" in paths
    assert {path for path in paths if not (ROOT / re.sub("[^/]*NAME.*", "", path)).exists()} == {"__init__.py"}


def test_names_in_contributing_are_in_the_files_beside_them():
    """Classes, constants and names with an underscore: in one of the files of the same item or paragraph."""
    checked = []
    for paragraph in re.split(r"\n\n|\n(?=\d\. |- |#)", PROSE.split("## Recipes")[1]):
        files = [ROOT / path for path in named_paths(code_spans(paragraph)) if "NAME" not in path]
        content = "\n".join(path.read_text() for path in files if path.is_file())
        for name in re.findall(r"`(\w+)[`(]", paragraph):
            if re.search(r"[A-Z]|_", name) and name != "NAME":
                checked.append(name)
                assert re.search(rf"\b{name}\b", content), f"{name} is in none of {[path.name for path in files]}"
    assert len(checked) > 25


def test_imports_in_contributing_work():
    imports = [node for block in CODE_BLOCKS for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert len(imports) > 10
    for node in imports:
        exec(ast.unparse(node), {})


def test_skeletons_of_a_head_and_an_optimizer_work():
    names: dict = {}
    exec("".join(CODE_BLOCKS[:2]), names)
    model, settings = small_config().model, OptimizerConfig()
    head = names["ResidualHead"](model, 0)
    with torch.no_grad():
        head.matrix.weight.copy_(torch.eye(model.dim))
    z_BTD = torch.randn(2, 3, model.dim)
    assert torch.equal(head(z_BTD), 2 * z_BTD)
    assert head.cost(3).flops == 2 * model.dim**2
    kind, weight = names["RmsProp"], torch.nn.Parameter(torch.ones(2))
    optimizer = kind.make(settings, {"weight": weight}, {"weight": (2,)})
    kind.prepare(optimizer.state[weight], weight)
    weight.grad = torch.tensor([1.0, -4.0])
    optimizer.step()
    assert set(optimizer.state[weight]) == {"step", *kind.tensors}
    change = settings.lr / (1 - settings.beta2) ** 0.5  # whatever the gradient's size
    torch.testing.assert_close(weight.detach(), torch.tensor([1 - change, 1 + change]))
