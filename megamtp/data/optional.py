"""Imports libraries that only some kinds of input need.

Tests: tests/unit/data/test_records.py.
"""

import importlib
from types import ModuleType

from megamtp.errors import InputError


def require(module: str) -> ModuleType:
    """Imports and returns a module. Raises InputError if its library is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        raise InputError(f"{library} is not installed; expected it for this input: pip install {library}") from None
