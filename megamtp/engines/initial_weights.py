"""Initial weights of a new model: random, or from a converted checkpoint (run.initial_weights).

Tests: tests/distributed/test_initial_weights.py.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megamtp.checkpoint import canonical
from megamtp.checkpoint.contents import Contents, resolve_defaults
from megamtp.checkpoint.tensors import read_tensor
from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.initial import initial_value


def initial_weights(config: Config) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Returns a function (parameter name in MTPModel, its shape) -> initial fp32 tensor on the CPU.

    Raises:
        InputError: see open_initial_weights.
    """
    if config.run.initial_weights:
        weights = open_initial_weights(config).weights
        return lambda name, shape: read_tensor(weights, name, torch.float32)
    return lambda name, shape: initial_value(name, shape, config.model, config.train.seed)


def without_initial_weights(config: Config) -> Config:
    """Returns the configuration with run.initial_weights unset."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, initial_weights=None))


def open_initial_weights(config: Config) -> Contents:
    """Opens the checkpoint run.initial_weights.

    Raises:
        InputError: it is not a canonical checkpoint of this model.
    """
    assert config.run.initial_weights is not None
    directory = Path(config.run.initial_weights)
    try:
        contents = canonical.read(directory)
        canonical.check_same_model(directory, contents.model, resolve_defaults(config.model))
    except InputError as error:
        raise InputError(f"run.initial_weights: {error}") from None
    return contents
