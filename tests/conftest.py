"""Options and marks: `--full` runs the whole product of the gradient cases and more; `gpu` tests skip where there is no GPU."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the full product of gradient cases, and 20 killed preparations (long)")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
