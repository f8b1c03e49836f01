"""Builds the engine that `engine.kind` names.

Tests: tests/distributed/test_checkpoints.py.
"""

from megamtp.config import Config
from megamtp.engines.base import Engine
from megamtp.engines.pipeline import PipelineEngine
from megamtp.engines.spread_pipeline import SpreadPipelineEngine
from megamtp.engines.zero import ZeroEngine
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition


def build_engine(config: Config, partition: Partition | SpreadPartition | None = None) -> Engine:
    """Builds the engine with its model on all ranks. Collective; torch.distributed must be initialised.

    Args:
        partition: the stages of a pipeline, as check_engine returns them. None: the best partition.
    """
    if config.engine.kind != "pipeline":
        return ZeroEngine(config)
    if config.engine.spread_losses:
        assert not isinstance(partition, Partition)
        return SpreadPipelineEngine(config, partition)
    return PipelineEngine(config, partition)
