"""Options and marks: `--full` runs the whole product of the gradient cases and more; `gpu` tests skip where there is
no GPU.
"""

import sys

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="the full product of gradient cases, 20 killed preparations, and more (long)",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        long_items = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in long_items]
        config.hook.pytest_deselected(items=long_items)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for mark in item.iter_markers("gpu"):
            needed = mark.kwargs.get("count", 1)
            if there < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU{'s' * (needed > 1)}"))


@pytest.fixture(scope="module")
def one_thread():
    """torch uses one thread, for tests of many tiny steps: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def call_command(monkeypatch, capsys):
    """call_command(module, *arguments) -> (exit status, stdout, stderr) of a command, in the test's own process."""

    def call(module, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        try:
            module.entry()
            status = 0
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call
