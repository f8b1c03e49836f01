"""Picks the engine that `engine.kind` names."""

from megamtp.config import Config
from megamtp.engines.base import Engine
from megamtp.engines.pipeline import PipelineEngine
from megamtp.engines.spread_pipeline import SpreadPipelineEngine
from megamtp.engines.zero import ZeroEngine


def build_engine(config: Config) -> Engine:
    """Builds the model on all ranks. torch.distributed must be initialised; collective."""
    if config.engine.spread_losses:
        return SpreadPipelineEngine(config)
    return {"zero1": ZeroEngine, "zero3": ZeroEngine, "pipeline": PipelineEngine}[config.engine.kind](config)
