"""Resolves the name of a head kind or optimizer kind: a built-in name, or MODULE:CLASS in a user's module."""

import importlib
from collections.abc import Mapping

from megamtp.errors import InputError


def find_kind(name: str, known: Mapping[str, type], base: type, key: str) -> type:
    """Returns the class that a setting names.

    Args:
        name: value of the setting: a key of `known`, or MODULE:CLASS, which is imported.
        known: built-in classes by name.
        base: class that the result must be a subclass of.
        key: key of the setting, for error messages.

    Raises:
        InputError: the name is unknown, cannot be imported, or is not a subclass of `base`.
    """
    if name in known:
        return known[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise InputError(f"{key}={name}; expected {' or '.join(known)}, or MODULE:CLASS of your own")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{key}={name} cannot be imported ({error}); expected MODULE:CLASS that Python can import"
        ) from None
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(
            f"{key}={name} cannot be imported ({type(error).__name__}: {error}); expected a module that imports "
            "without errors"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise InputError(f"{key}={name} is {kind!r}; expected a subclass of {base.__module__}:{base.__name__}")
    return kind
