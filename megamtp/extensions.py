"""Kinds of heads and optimizers by name: ours, or MODULE:CLASS of a user's own module."""

import importlib
from collections.abc import Mapping

from megamtp.errors import InputError


def find_kind(name: str, known: Mapping[str, type], base: type, key: str) -> type:
    """The class that a setting names.

    Args:
        name: a key of `known`, or MODULE:CLASS, which is imported.
        base: the class must be a subclass of it.
        key: of the setting, for messages.

    Raises:
        InputError: it is not known, cannot be imported, or is no subclass of `base`.
    """
    if name in known:
        return known[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise InputError(f"{key}={name}; expected {' or '.join(known)}, or MODULE:CLASS of your own")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{key}={name} cannot be imported ({error}); expected MODULE:CLASS that Python finds"
        ) from None
    except (Exception, SystemExit) as error:  # the module is the user's and may raise anything
        raise InputError(
            f"{key}={name} cannot be imported ({type(error).__name__}: {error}); expected a module that imports "
            "without errors"
        ) from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{key}={name} is {found!r}; expected a subclass of {base.__module__}:{base.__name__}")
    return found
