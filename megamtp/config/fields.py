"""Dataclass fields with a description and bounds: `option(1000, "steps of warm-up", at_least=0)`.

Tests: tests/unit/config/test_reader.py.
"""

import dataclasses
import types
import typing
from dataclasses import MISSING, dataclass, field
from typing import Any

from omegaconf import MISSING as REQUIRED

from megamtp.errors import InputError

MAX_INTEGER = 2**31 - 1  # the product of two integers, such as a tensor's size, fits into int64
MAX_FLOAT = 3.4e38  # the largest fp32 number: DeepSpeed and torch compute in fp32
MAX_TEXT_BYTES = 4096  # the longest string: Linux refuses longer paths

__all__ = ["REQUIRED", "Section", "check_paths", "expect", "option", "parse_number", "shown", "type_name"]


@dataclass(frozen=True)
class Bounds:
    """The values that a field may have. None means that there is no such bound; `below` needs `at_least`.

    In a list or a mapping, each element must be within the bounds.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    one_of: tuple[str | None, ...] = ()
    max_bytes: int = MAX_TEXT_BYTES

    def check_number(self, found: str, value: float) -> None:
        """Raises InputError if the number is out of bounds. `found` names the setting and its value."""
        largest = MAX_INTEGER if isinstance(value, int) else MAX_FLOAT
        if self.at_most is not None:
            largest = self.at_most
        expect(abs(value) <= largest, found, f"{'a finite number, ' if largest == MAX_FLOAT else ''}at most {largest}")
        if self.below is not None:
            assert self.at_least is not None
            expect(self.at_least <= value < self.below, found, f"a number in [{self.at_least}, {self.below})")
        if self.above is not None:
            expect(value > self.above, found, f"a number above {self.above}")
        if self.at_least is not None:
            expect(value >= self.at_least, found, f"at least {self.at_least}" if self.at_least else "0 or more")


def option(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    one_of: tuple[str | None, ...] = (),
    max_bytes: int = MAX_TEXT_BYTES,
    only: dict[str, tuple[str, ...]] | None = None,
) -> Any:
    """Returns a dataclass field with its `--help` text and its bounds.

    Args:
        default: REQUIRED makes the user give a value.
        meaning: the `--help` text.
        at_least, above, below, at_most: bounds of a number, or of each number in a list or a mapping. `below` needs
            `at_least`.
        one_of: the values of a string.
        max_bytes: largest size of a string as UTF-8.
        only: {other field of the section: its values with which this field has an effect}. With any other value of
            that field, this field must have its default value.
    """
    bounds = Bounds(at_least, above, below, at_most, one_of, max_bytes)
    metadata = {"meaning": meaning, "bounds": bounds, "only": only or {}}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """A section of the configuration: a dataclass whose fields are options or sections."""

    def check(self, name: str) -> None:
        """Raises InputError if a setting of the section called `name` has a wrong type or value, or no effect."""
        items = dataclasses.fields(typing.cast(Any, self))
        for item in items:
            key, value = f"{name}.{item.name}", getattr(self, item.name)
            if isinstance(value, Section):
                value.check(key)
            else:
                _check_value(key, value, item.type, item.metadata["bounds"])
        for item in items:
            self._check_has_effect(name, item)
        self.check_together()

    def check_together(self) -> None:
        """Raises InputError if settings of this section conflict. Each is within its own bounds."""

    def _check_has_effect(self, name: str, item: "dataclasses.Field[Any]") -> None:
        value = getattr(self, item.name)
        default = item.default if item.default is not MISSING else typing.cast(Any, item.default_factory)()
        for other, values in item.metadata.get("only", {}).items():
            chosen = getattr(self, other)
            expect(
                chosen in values or value == default,
                f"{name}.{item.name}={value} with {name}.{other}={shown(chosen)}",
                f"{name}.{other}={' or '.join(values)}: the setting has no effect otherwise",
            )


def expect(good: bool, found: str, expected: str) -> None:
    """Raises InputError unless `good`."""
    if not good:
        raise InputError(f"{found}; expected {expected}")


def shown(value: Any) -> str:
    """Returns the value as text; None as null."""
    return "null" if value is None else str(value)


def type_name(expected: Any) -> str:
    """Returns a field's type in words, such as `int or null`."""
    if isinstance(expected, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(expected))
    if expected is type(None):
        return "null"
    return "mapping" if typing.get_origin(expected) is dict else getattr(expected, "__name__", str(expected))


def parse_number(word: str) -> float | None:
    """Returns the number that the word represents, or None if it does not represent a number."""
    try:
        return float(word)
    except ValueError:
        return None


def check_paths(*paths: str | None) -> None:
    """Raises InputError if a path begins with ~."""
    for path in filter(None, paths):
        expect(path.split("/")[0] != "~", path, "a path without ~, which is not expanded here: write $HOME")


def _check_value(key: str, value: Any, expected: Any, bounds: Bounds, place: str = "") -> None:
    """Checks the type and the bounds of a value and of the values inside it.

    OmegaConf does not check the types inside lists and mappings. `place` says where in the setting `key` the value is,
    such as "[0]".
    """
    allowed = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if expected is Any:
        good = isinstance(value, None | bool | int | float | str | list | dict)
    else:
        good = isinstance(value, tuple(typing.get_origin(kind) or kind for kind in allowed)) or (
            float in allowed and isinstance(value, int)
        )
    found = f"{key}{place}={shown(value)}"
    kinds = "null, true or false, a number, text, a list or a mapping" if expected is Any else type_name(expected)
    expect(good, found, kinds)
    inner = next((typing.get_args(kind)[-1] for kind in allowed if typing.get_origin(kind) is type(value)), Any)
    if isinstance(value, dict):
        for name, element in value.items():
            expect(isinstance(name, str), found, f"text as keys, not {name!r}")
            _check_value(key, element, inner, bounds, f"{place}.{name}")
    elif isinstance(value, list):
        for index, element in enumerate(value):
            _check_value(key, element, inner, bounds, f"{place}[{index}]")
    elif isinstance(value, str):
        _check_text(key, value, found, bounds, may_be_empty=expected is Any)
    elif isinstance(value, float | int) and not isinstance(value, bool):
        bounds.check_number(found, value)
    if bounds.one_of:
        expect(value in bounds.one_of, found, " or ".join(map(shown, bounds.one_of)))


def _check_text(key: str, value: str, found: str, bounds: Bounds, may_be_empty: bool) -> None:
    expect(bool(value) or may_be_empty, found, "a name")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise InputError(f"{found}; expected text that can be written as UTF-8") from None
    expect("\0" not in value, found, "text without null characters")
    expect(num_bytes <= bounds.max_bytes, f"{key} has {num_bytes} bytes", f"at most {bounds.max_bytes}")
