"""Whole losses, or losses spread by vocabulary: the best plan of the other kind beside the one that a pipeline has."""

import dataclasses

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.planning.links import NOMINAL
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition, best_cut


def other_losses(config: Config) -> tuple[Config, str]:
    """The configuration with the other value of engine.spread_losses, and that setting in words."""
    spread_losses = not config.engine.spread_losses
    changed = dataclasses.replace(config, engine=dataclasses.replace(config.engine, spread_losses=spread_losses))
    return changed, f"engine.spread_losses={str(spread_losses).lower()}"


def compared(config: Config, data_parallel_size: int, cut: Partition | SpreadPartition) -> str:
    """Lines about the other kind's best plan, and about which step is shorter, by FLOPs and over the nominal link."""
    (changed, setting), exchange = other_losses(config), NOMINAL.exchange(config)
    try:
        other = best_cut(changed, data_parallel_size)
    except InputError as error:
        return f"with {setting}: {error}"
    memory = max(sum(stage.memory_bytes.values()) for stage in other.stages) / 2**30
    layers = [stage.num_layers for stage in other.stages]
    verdict = faster(setting, other.step(exchange) / cut.step(exchange))
    return (
        f"with {setting}: layers {layers}, at most {memory:.2f} GiB; {other.outcome}\n"
        f"{verdict}, on H100s with 50 GB/s between stages"
    )


def faster(setting: str, ratio: float) -> str:
    """Whether the setting is predicted to shorten a step, to `ratio` of its time."""
    if ratio < 1:
        return f"{setting} is predicted to be faster: a step in {ratio:.3f} of the time"
    return f"{setting} is not predicted to be faster: a step in {ratio:.3f} of the time"
