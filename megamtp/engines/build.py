"""Picks the engine that `engine.kind` names.

Tests: tests/distributed/test_checkpoints.py.
"""

from megamtp.config import Config
from megamtp.engines.base import Engine
from megamtp.engines.pipeline import PipelineEngine
from megamtp.engines.spread_pipeline import SpreadPipelineEngine
from megamtp.engines.zero import ZeroEngine
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition


def build_engine(config: Config, cut: Partition | SpreadPartition | None = None) -> Engine:
    """Builds the model on all ranks. torch.distributed must be initialised; collective.

    Args:
        cut: of a pipeline, where check_engine has already found it.
    """
    if config.engine.kind != "pipeline":
        return ZeroEngine(config)
    if config.engine.spread_losses:
        assert not isinstance(cut, Partition)
        return SpreadPipelineEngine(config, cut)
    return PipelineEngine(config, cut)
