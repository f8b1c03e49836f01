"""Compares train.precision=fp8 with bf16: the CPU needs longer to launch a layer in fp8, the GPU needs less time."""

import dataclasses

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.planning.gpus import find_gpu
from megamtp.planning.loss_choice import describe_speed
from megamtp.planning.planner import plan


def with_bf16(config: Config) -> tuple[Config, str]:
    """Returns the configuration with train.precision=bf16, and the changed settings as `key=value`."""
    changed, settings = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16")), ""
    if config.head_loss.precision is None and not config.head_loss.fp8_first_head:  # has no effect in bf16
        changed = dataclasses.replace(changed, head_loss=dataclasses.replace(config.head_loss, fp8_first_head=True))
        settings = " head_loss.fp8_first_head=true"
    return changed, f"train.precision=bf16{settings}"


def describe_slow_float8(config: Config, world_size: int, device_name: str) -> str | None:
    """Returns a sentence if a step in fp8 is not predicted to be shorter than in bf16.

    None: it is shorter, the run is not in fp8, or its GPU or engine is not planned.
    """
    gpu, (changed, setting) = find_gpu(device_name), with_bf16(config)
    if gpu is None or config.train.precision != "fp8":
        return None
    try:
        ratio = plan(changed, world_size, gpu).step_seconds / plan(config, world_size, gpu).step_seconds
    except InputError:
        return None
    return None if ratio > 1 else f"train.precision=fp8 on {device_name}: {describe_speed(setting, ratio)}"
