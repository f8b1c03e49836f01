"""Checks the configuration of an engine before torch.distributed is initialised. Imports no engine."""

from megamtp.config import Config
from megamtp.engines.deepspeed.settings import deepspeed_config
from megamtp.model.heads import head_class
from megamtp.optimizers.kinds import optimizer_kind
from megamtp.planning.partition import Partition, data_parallel_rank_and_size
from megamtp.planning.spread import SpreadPartition, best_partition


def check_engine(
    config: Config, rank: int, world_size: int
) -> tuple[tuple[int, int], Partition | SpreadPartition | None]:
    """Checks the configuration, and returns what follows from it.

    Returns:
        ((data_parallel_rank, data_parallel_size), best partition): the partition is None without a pipeline.

    Raises:
        InputError: ranks, batch, layers or settings do not fit together, or the head or optimizer kind is unknown.
    """
    head_class(config.model)
    optimizer_kind(config.optimizer)
    rank_and_size = data_parallel_rank_and_size(config, rank, world_size)
    _, data_parallel_size = rank_and_size
    deepspeed_config(config, data_parallel_size)
    return rank_and_size, best_partition(config, data_parallel_size) if config.engine.kind == "pipeline" else None
