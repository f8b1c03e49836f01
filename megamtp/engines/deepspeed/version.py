"""Checks the version of DeepSpeed.

Tests: tests/distributed/test_gather.py.
"""

import deepspeed

from megamtp.errors import InputError

SUPPORTED = "0.19."


def check_version(version: str = deepspeed.__version__) -> None:
    """Checks that this DeepSpeed has the private members that members.py lists.

    Raises:
        InputError: the version is not supported.
    """
    if not version.startswith(SUPPORTED):
        raise InputError(f"DeepSpeed {version}; expected {SUPPORTED}*: run pip install 'deepspeed>=0.19.8,<0.20'")
