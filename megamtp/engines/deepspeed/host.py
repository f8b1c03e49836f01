"""How DeepSpeed comes to host a model: devices, construction in shards, initialisation.

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
from megamtp.engines.deepspeed.members import HostEngine, is_bf16, is_zero3, sharded
from megamtp.engines.deepspeed.settings import deepspeed_config
from megamtp.engines.deepspeed.version import check_version


def current_device() -> torch.device:
    """This rank's device, as DeepSpeed chose it."""
    return torch.device(get_accelerator().current_device_name())


def host(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, data_parallel_size: int) -> HostEngine:
    """The engine that runs `model`. Collective. Raises InputError: this DeepSpeed is not supported."""
    check_version()
    settings = deepspeed_config(config, data_parallel_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def set_learning_rate(engine: HostEngine, lr: float) -> None:
    """Of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def sharded_construction(settings: dict[str, Any]) -> contextlib.AbstractContextManager:
    """Modules made in this block hold shards: no rank ever has more than one whole parameter.

    zero.Init gets the settings alone, because its dtype argument turns fp32 into bf16 on CPUs.
    """
    return deepspeed.zero.Init(config_dict_or_path=settings)


def gather_whole(model: nn.Module, classes: Iterable[type[nn.Module]]) -> None:
    """ZeRO-3 gathers modules of these classes as a whole: one gather each, and no hooks inside."""
    set_z3_leaf_modules(model, list(classes))


def set_whole(parameters: list[nn.Parameter], owner: int) -> contextlib.AbstractContextManager:
    """In this block the sharded parameters are whole, and rank `owner` sets them for all. Collective."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=owner)


def forget_skipped_gradients(engine: HostEngine) -> None:
    """After a skipped step of ZeRO-1 with an offloaded optimizer.

    DeepSpeed keeps its gradients and would add the next step's to them. Source:
    deepspeed/runtime/zero/stage_1_and_2.py, step.
    """
    optimizer = engine.optimizer
    assert not is_zero3(optimizer) and not is_bf16(optimizer)
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None


def fill_shards(model: nn.Module, standard_deviation: float) -> None:
    """Values for the one rank of an emulated cluster: of the right size, drawn without the peers, which do not
    exist.
    """
    for parameter in sharded(model.parameters()):
        if len(parameter.ds_shape) == 1:
            parameter.ds_tensor.fill_(1.0)
        else:
            parameter.ds_tensor.normal_(0.0, standard_deviation)
