"""Libraries that only some inputs need.

Tests: tests/unit/data/test_records.py.
"""

import importlib
from types import ModuleType

from megamtp.errors import InputError


def require(module: str) -> ModuleType:
    """The module. Raises InputError: its library is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        raise InputError(f"{library} is not installed, expected for this input; run: pip install {library}") from None
