"""What can be wrong about an engine, found before peers and devices are met; light to import."""

from megamtp.config import Config
from megamtp.engines.deepspeed.settings import deepspeed_config
from megamtp.model.heads import head_class
from megamtp.optimizers.kinds import optimizer_kind
from megamtp.planning.partition import Partition, data_parallel_place
from megamtp.planning.spread import SpreadPartition, best_cut


def check_engine(
    config: Config, rank: int, world_size: int
) -> tuple[tuple[int, int], Partition | SpreadPartition | None]:
    """(data_parallel_rank, data_parallel_size) that the engine will have, and a pipeline's best cut.

    Raises:
        InputError: ranks, batch, layers or settings do not go together, or a kind of head or optimizer is not known.
    """
    head_class(config.model)
    optimizer_kind(config.optimizer)
    place = data_parallel_place(config, rank, world_size)
    deepspeed_config(config, place[1])
    return place, best_cut(config, place[1]) if config.engine.kind == "pipeline" else None
