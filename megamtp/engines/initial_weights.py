"""Where a new model's weights come from: drawn, or those of a converted checkpoint (run.initial_weights).

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
    """(a parameter's name in MTPModel, its shape) -> the fp32 CPU tensor from which it starts.

    Raises:
        InputError: as open_initial_weights.
    """
    if config.run.initial_weights:
        weights = open_initial_weights(config).weights
        return lambda name, shape: read_tensor(weights, name, torch.float32)
    return lambda name, shape: initial_value(name, shape, config.model, config.train.seed)


def without_initial_weights(config: Config) -> Config:
    """The same with run.initial_weights unset."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, initial_weights=None))


def open_initial_weights(config: Config) -> Contents:
    """Raises: InputError if run.initial_weights is no canonical checkpoint of this model."""
    assert config.run.initial_weights is not None
    directory = Path(config.run.initial_weights)
    try:
        contents = canonical.read(directory)
        canonical.check_same_model(directory, contents.model, resolve_defaults(config.model))
    except InputError as error:
        raise InputError(f"run.initial_weights: {error}") from None
    return contents
