"""Which DeepSpeed the engines work with.

Tests: tests/distributed/test_gather.py.
"""

import deepspeed

from megamtp.errors import InputError

SUPPORTED = "0.19."


def check_version(version: str = deepspeed.__version__) -> None:
    """Raises InputError: the private members of this DeepSpeed may differ from those that members.py names."""
    if not version.startswith(SUPPORTED):
        raise InputError(f"DeepSpeed {version}; expected {SUPPORTED}*: run pip install 'deepspeed>=0.19.8,<0.20'")
