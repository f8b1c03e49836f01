"""Reads YAML files and `key=value` overrides into a checked Config, and writes a Config as YAML.

`read_config(["configs/quickstart.yaml", "optimizer.lr=3e-4"])` returns a Config; `print_help` prints the text of
`--help`.
"""

import dataclasses
import difflib
import functools
import io
import os
import re
import shlex
import types
import typing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megamtp.config import consistency
from megamtp.config.fields import parse_number, shown, type_name
from megamtp.config.schema import BYTES, Config
from megamtp.errors import InputError
from megamtp.files import write_atomically

RESOLVED = "config.yaml"  # a file in a run's folder with the whole configuration
MAX_DEPTH = 16  # levels of nested lists and mappings
MAX_NUMBER_LENGTH = 400  # characters, of any base; Python prints integers of at most 4300 decimal digits


def read_config(arguments: list[str]) -> Config:
    """Returns the checked configuration that `[file.yaml, key=value, ...]` describe. Later ones override earlier ones.

    Raises:
        InputError: a file cannot be read, a key is unknown (the message names the most similar key), or a value is
            missing or wrong.
    """
    settings = _schema()
    for argument in arguments:
        _merge(settings, argument, _parse(argument))
    try:
        missing = sorted(OmegaConf.missing_keys(settings))
        config = None if missing else OmegaConf.to_object(settings)
    except (OmegaConfBaseException, RecursionError) as error:
        # An interpolation, ${...}, refers to a missing key or to the section that contains it.
        key = getattr(error, "full_key", None)
        raise InputError(
            f"{f'{key}: ' if key else ''}{_first_line(error)}; expected a value, or ${{section.key}}"
        ) from None
    if config is None:
        raise InputError(f"{missing[0]} is not set; give it in the YAML file or as {missing[0]}=VALUE")
    assert isinstance(config, Config)
    consistency.check(config)
    return config


def write_config(config: Config, path: Path) -> None:
    """Saves the resolved configuration as YAML that `read_config` accepts, from any working directory."""
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.structured(with_absolute_paths(config))).encode())


def with_absolute_paths(config: Config) -> Config:
    """Returns a copy with absolute paths of data and weights."""
    if config.run.initial_weights:
        run = dataclasses.replace(config.run, initial_weights=_absolute(config.run.initial_weights))
        config = dataclasses.replace(config, run=run)
    data = config.data
    validation = _absolute(data.validation) if data.validation else data.validation
    tokenizer = _absolute(data.tokenizer) if data.tokenizer and data.tokenizer != BYTES else data.tokenizer
    corpora = [(weight, _absolute(prefix)) for weight, prefix in data.train_corpora]
    blend = " ".join(f"{weight!r} {shlex.quote(prefix)}" for weight, prefix in corpora)
    train = corpora[0][1] if len(corpora) == 1 else blend
    data = dataclasses.replace(data, train=train, validation=validation, tokenizer=tokenizer)
    return dataclasses.replace(config, data=data)


def differences(old: Config, new: Config) -> list[str]:
    """Returns one line for each setting that differs: `section.key: old value -> new value`."""
    lines = []
    for key in _keys(Config):
        before, after = (functools.reduce(getattr, key.split("."), config) for config in (old, new))
        if before != after:
            lines.append(f"{key}: {shown(before)} -> {shown(after)}")
    return lines


def describe_keys() -> str:
    """Returns one line per key with its meaning, type and default."""
    defaults = _schema()
    required = OmegaConf.missing_keys(defaults)
    lines = []
    for key, item in _keys(Config).items():
        default = "required" if key in required else shown(OmegaConf.select(defaults, key))
        lines.append(f"  {key:38s} {item.metadata['meaning']} [{type_name(item.type)}; {default}]")
    return "\n".join(lines)


def print_help(arguments: list[str], description: str) -> bool:
    """Prints the help of a command that takes keys if `arguments` ask for it. Returns whether they do."""
    if "--help" not in arguments and "-h" not in arguments:
        return False
    with suppress(BrokenPipeError):  # the reader has closed the pipe, as `| head` does
        print(f"{description}\nKeys [type; default]:\n{describe_keys()}")
    return True


def _schema() -> DictConfig:
    schema = OmegaConf.structured(Config)
    for section in ("", *_sections(Config)):
        node = OmegaConf.select(schema, section) if section else schema
        OmegaConf.set_readonly(node, None)  # frozen dataclasses make read-only nodes, which cannot be merged
    return schema


def _parse(argument: str) -> DictConfig:
    """Returns the settings of a YAML file or of key=value."""
    # os.path.isfile returns False if the name is too long for a path; Path.is_file may raise OSError.
    is_override = "=" in argument and not os.path.isfile(argument)
    return _parse_override(argument) if is_override else _parse_file(argument)


def _parse_override(argument: str) -> DictConfig:
    key, _, value = argument.partition("=")
    try:
        _check_yaml_limits(value, key.count(".") + key.count("["))
        return OmegaConf.from_dotlist([argument])
    except Exception as error:  # YAML tags may raise any exception: !!bool 3 raises KeyError
        in_braces = isinstance(error, yaml.YAMLError) and "{" in argument
        spaces = ", with a space after each colon in braces: {a: {b: 2}}" if in_braces else ""
        raise InputError(f"{argument}: {_yaml_problem(error)}; expected key=value{spaces}") from None


def _parse_file(path: str) -> DictConfig:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; expected a YAML file or key=value") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: {reason}; expected a YAML file or key=value") from None
    try:
        _check_yaml_limits(text)
        settings = OmegaConf.load(io.StringIO(text))
    except (OSError, AssertionError):
        settings = None  # OmegaConf raises these if the file holds only a number, quoted or not, or a boolean
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{path} is not valid YAML, {place}{_yaml_problem(error)}; correct the file") from None
    if not isinstance(settings, DictConfig):
        raise InputError(f"{path} holds no mapping of keys; expected sections such as 'model: {{dim: 128}}'")
    _drop_empty_sections(settings)
    return settings


def _drop_empty_sections(settings: DictConfig) -> None:
    """Removes empty sections. A section is empty if all of its keys are commented out."""
    values = OmegaConf.to_container(settings)
    for section in _sections(Config):
        *parents, name = section.split(".")
        inner, node = values, settings
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None
            node = node[parent] if isinstance(inner, dict) else node
        if isinstance(inner, dict) and inner.get(name, ...) is None:
            del node[name]


def _check_yaml_limits(text: str, depth: int = 0) -> None:
    """Refuses YAML text that is nested too deeply, or has too long a number, to be parsed and printed safely.

    Args:
        depth: the number of levels above the text.

    Raises:
        yaml.YAMLError: the text is nested more than MAX_DEPTH levels deep, or has a number of more than
            MAX_NUMBER_LENGTH characters.
    """
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep")
        is_long = isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_NUMBER_LENGTH
        if is_long and re.fullmatch(r"[-+_]*[0-9][-+0-9a-fA-FxX_:.]*", event.value):
            raise yaml.YAMLError(f"a number of {len(event.value)} characters")


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.YAMLError | OmegaConfBaseException | ValueError):
        return getattr(error, "problem", None) or _first_line(error)
    return f"no valid key or value ({type(error).__name__}: {_first_line(error)})"


def _merge(settings: DictConfig, source: str, given: DictConfig) -> None:
    """Merges `given`, which was read from `source`, into `settings`."""
    known = _keys(Config)
    for name, value in _settings(OmegaConf.to_container(given)):
        if name not in known:
            raise InputError(f"{source}: unknown key {name}; {_suggestion(str(name), list(known))}")
        # OmegaConf reads every whole number except 0 as true.
        if known[name].type in (bool, bool | None) and parse_number(str(value)) not in (None, 0, 1):
            raise InputError(f"{source}: {name}: {value} is neither true nor false{_expected(name)}")
    try:
        settings.merge_with(given)  # OmegaConf.merge would copy all settings, which takes 10 ms
    except (OmegaConfBaseException, TypeError, OverflowError) as error:
        key = getattr(error, "full_key", None)
        raise InputError(
            f"{source}: {f'{key}: ' if key else ''}{_first_line(error)}{_expected(key or source.partition('=')[0])}"
        ) from None


def _settings(values: Any, prefix: str = "") -> Iterator[tuple[Any, Any]]:
    """Yields (dotted key, value) of all settings in a mapping that was read from YAML.

    Descends into sections, and into unknown top-level mappings, so that the keys in these are reported. A key and a
    value may have any type.
    """
    for name, value in values.items():
        key = f"{prefix}{name}" if prefix else name
        is_section = key in _sections(Config)
        if isinstance(value, dict) and (is_section or (value and not prefix)):
            yield from _settings(value, f"{key}.")
        else:
            yield key, value


def _expected(key: str) -> str:
    """Returns `; expected TYPE` for a setting or an element of a setting, such as `head_loss.weights[0]`."""
    for setting, item in _keys(Config).items():
        expected: Any = item.type
        if key.startswith((f"{setting}.", f"{setting}[")):
            container = typing.get_args(expected)[0] if isinstance(expected, types.UnionType) else expected
            inner = typing.get_args(container)
            expected = inner[-1] if inner else None
        elif key != setting:
            continue
        return f"; expected {type_name(expected)}" if expected else ""
    return ""


@functools.cache
def _keys(section: Any, prefix: str = "") -> "dict[str, dataclasses.Field[Any]]":
    """Returns the field of every setting by its dotted key."""
    items = {}
    for item in dataclasses.fields(section):
        if item.default_factory is not MISSING and dataclasses.is_dataclass(item.default_factory):
            items |= _keys(item.default_factory, f"{prefix}{item.name}.")
        else:
            items[prefix + item.name] = item
    return items


@functools.cache
def _sections(section: Any, prefix: str = "") -> list[str]:
    """Returns the dotted keys of all sections. A section comes before the sections inside it."""
    keys: list[str] = []
    for item in dataclasses.fields(section):
        if item.default_factory is not MISSING and dataclasses.is_dataclass(item.default_factory):
            keys += [prefix + item.name, *_sections(item.default_factory, f"{prefix}{item.name}.")]
    return keys


def _suggestion(name: str, known: list[str]) -> str:
    def similarity(key: str) -> float:
        """Returns the similarity to the key or to its last part, if that is larger, so that `lr` finds optimizer.lr."""
        pairs = ((name, key), (name.rpartition(".")[2], key.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return f"did you mean {max(known, key=similarity)}? (--help lists every key)"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].split())


def _absolute(path: str) -> str:
    return str(Path(path).absolute())
