"""Compares the two placements of a pipeline's losses: whole on the heads' stages, or spread by vocabulary."""

import dataclasses

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.planning.links import NOMINAL_LINK
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition, best_partition


def with_other_loss_placement(config: Config) -> tuple[Config, str]:
    """Returns the configuration with the other value of engine.spread_losses, and that setting as `key=value`."""
    spread_losses = not config.engine.spread_losses
    changed = dataclasses.replace(config, engine=dataclasses.replace(config.engine, spread_losses=spread_losses))
    return changed, f"engine.spread_losses={str(spread_losses).lower()}"


def describe_other_placement(config: Config, data_parallel_size: int, partition: Partition | SpreadPartition) -> str:
    """Returns lines about the best partition with the other loss placement, and about which step is shorter.

    Times are counted in FLOPs, and transfers use the nominal link.
    """
    (changed, setting), transfer_times = with_other_loss_placement(config), NOMINAL_LINK.transfer_times(config)
    try:
        other = best_partition(changed, data_parallel_size)
    except InputError as error:
        return f"with {setting}: {error}"
    memory_gib = max(sum(stage.memory_bytes.values()) for stage in other.stages) / 2**30
    layers = [stage.num_layers for stage in other.stages]
    verdict = describe_speed(setting, other.step_time(transfer_times) / partition.step_time(transfer_times))
    return (
        f"with {setting}: layers {layers}, at most {memory_gib:.2f} GiB; {other.balance_summary}\n"
        f"{verdict}, on H100s with 50 GB/s between stages"
    )


def describe_speed(setting: str, step_time_ratio: float) -> str:
    """Returns a sentence that says whether `setting` is predicted to shorten the step, and by which factor."""
    if step_time_ratio < 1:
        return f"{setting} is predicted to be faster: {step_time_ratio:.3f} times the step time"
    return f"{setting} is not predicted to be faster: {step_time_ratio:.3f} times the step time"
