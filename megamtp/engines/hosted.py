"""What the engines that DeepSpeed hosts have in common.

Tests: tests/distributed/test_checkpoints.py, tests/distributed/test_pipeline.py, tests/distributed/test_zero.py.
"""

from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megamtp.config import Config
from megamtp.engines.base import EngineState, StepResult
from megamtp.engines.deepspeed.host import current_device, host
from megamtp.engines.deepspeed.members import HostEngine, full_shape
from megamtp.engines.deepspeed.saved_state import engine_state, load_state
from megamtp.optimizers.kinds import optimizer_kind


class HostedEngine:
    """What the engines that DeepSpeed hosts have in common. See Engine for the attributes.

    Attributes:
        engine: DeepSpeed's own, after `host`.
        model: the module that it hosts.
    """

    engine: HostEngine
    model: nn.Module

    def __init__(self, config: Config, data_parallel_place: tuple[int, int]):
        self.config = config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank, self.data_parallel_size = data_parallel_place
        self.device = current_device()

    def host(self, model: nn.Module) -> None:
        """Hands the model and its optimizer to DeepSpeed. Collective."""
        shapes = {name: full_shape(parameter) for name, parameter in model.named_parameters()}
        settings = self.config.optimizer
        optimizer = optimizer_kind(settings).make(settings, dict(model.named_parameters()), shapes)
        self.model, self.engine = model, host(self.config, model, optimizer, self.data_parallel_size)

    def step_result(self, nll_sums: Tensor) -> StepResult:
        """Of the step that the engine has just taken."""
        return StepResult(nll_sums, float(self.engine.get_global_grad_norm()), self.engine.was_step_applied() is False)

    def state(self) -> EngineState:
        """See Engine.state."""
        return engine_state(self.engine, self.config.optimizer)

    def load(self, checkpoint: Path) -> None:
        """See Engine.load."""
        load_state(self.engine, checkpoint, self.config, self.rank, self.world_size)
