"""Builds a model in an engine of DeepSpeed, and controls that engine: learning rate, skipped gradients.

Tests: tests/distributed/test_initial_weights.py, tests/distributed/test_training.py.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from megamtp.config import Config
from megamtp.engines.deepspeed.members import DeepSpeedEngine, is_bf16, is_zero3, sharded
from megamtp.engines.deepspeed.settings import deepspeed_config
from megamtp.engines.deepspeed.version import check_version


def current_device() -> torch.device:
    """Returns the device that DeepSpeed chose for this rank."""
    return torch.device(get_accelerator().current_device_name())


def initialize(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, data_parallel_size: int
) -> DeepSpeedEngine:
    """Returns DeepSpeed's engine for the model. Collective.

    Raises:
        InputError: the installed version of DeepSpeed is not supported.
    """
    check_version()
    settings = deepspeed_config(config, data_parallel_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def set_learning_rate(engine: DeepSpeedEngine, lr: float) -> None:
    """Sets the learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def sharded_construction(settings: dict[str, Any]) -> contextlib.AbstractContextManager:
    """Returns a context that builds modules in shards: no rank ever holds more than one full parameter.

    zero.Init gets only the settings: its dtype argument would turn fp32 into bf16 on CPUs.
    """
    return deepspeed.zero.Init(config_dict_or_path=settings)


def gather_as_one_module(model: nn.Module, classes: Iterable[type[nn.Module]]) -> None:
    """Makes ZeRO-3 gather a module of these classes with its submodules in one gather, without hooks inside it."""
    set_z3_leaf_modules(model, list(classes))


def gathered_for_update(parameters: list[nn.Parameter], owner: int) -> contextlib.AbstractContextManager:
    """Returns a context in which parameters are available in full. All ranks get the values of `owner`. Collective."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=owner)


def discard_skipped_gradients(engine: DeepSpeedEngine) -> None:
    """Discards the gradients of a skipped step under ZeRO-1 with an offloaded optimizer.

    DeepSpeed keeps them and would add the next step's gradients to them.

    Source: deepspeed/runtime/zero/stage_1_and_2.py, step.
    """
    optimizer = engine.optimizer
    assert not is_zero3(optimizer) and not is_bf16(optimizer)
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None


def fill_shards(model: nn.Module, standard_deviation: float) -> None:
    """Fills the shards of the only real rank of an emulated cluster with random weights, without communication."""
    for parameter in sharded(model.parameters()):
        if len(parameter.ds_shape) == 1:
            parameter.ds_tensor.fill_(1.0)
        else:
            parameter.ds_tensor.normal_(0.0, standard_deviation)
