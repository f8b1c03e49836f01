"""The base class of the hosted engines: engines that run the model and the optimizer in an engine of DeepSpeed.

Tests: tests/distributed/test_checkpoints.py, tests/distributed/test_pipeline.py, tests/distributed/test_zero.py.
"""

from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megamtp.config import Config
from megamtp.engines.base import EngineState, StepResult
from megamtp.engines.deepspeed.host import current_device, initialize
from megamtp.engines.deepspeed.members import DeepSpeedEngine, full_shape
from megamtp.engines.deepspeed.saved_state import engine_state, load_state
from megamtp.optimizers.kinds import optimizer_kind


class HostedEngine:
    """The methods and attributes of Engine that are the same for all hosted engines.

    Attributes:
        deepspeed_engine: the engine that deepspeed.initialize returns; set by `attach_model`.
        model: the module that it runs; set by `attach_model`.
    """

    deepspeed_engine: DeepSpeedEngine
    model: nn.Module

    def __init__(self, config: Config, data_parallel_rank_and_size: tuple[int, int]):
        self.config = config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank_and_size
        self.device = current_device()

    def attach_model(self, model: nn.Module) -> None:
        """Builds the optimizer, and gives the model and the optimizer to DeepSpeed. Collective."""
        shapes = {name: full_shape(parameter) for name, parameter in model.named_parameters()}
        settings = self.config.optimizer
        optimizer = optimizer_kind(settings).make(settings, dict(model.named_parameters()), shapes)
        self.model = model
        self.deepspeed_engine = initialize(self.config, model, optimizer, self.data_parallel_size)

    def step_result(self, nll_sums: Tensor) -> StepResult:
        """Returns the result of the step that DeepSpeed has just taken."""
        engine = self.deepspeed_engine
        return StepResult(nll_sums, float(engine.get_global_grad_norm()), engine.was_step_applied() is False)

    def state(self) -> EngineState:
        """See Engine.state."""
        return engine_state(self.deepspeed_engine, self.config.optimizer)

    def load(self, checkpoint: Path) -> None:
        """See Engine.load."""
        load_state(self.deepspeed_engine, checkpoint, self.config, self.rank, self.world_size)
