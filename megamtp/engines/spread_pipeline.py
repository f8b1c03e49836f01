"""The pipeline engine with spread losses. DeepSpeed executes, reduces and optimizes; the schedule is ours.

DeepSpeed's 1F1B schedule has no pass for a loss that depends on data from all stages. But its pipeline engine executes
any schedule, also with new instructions. spread_passes.py has our passes.

Tests: tests/distributed/test_spread_pipeline.py.
"""

from functools import partial

import torch

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.deepspeed import pipeline as deepspeed_pipeline
from megamtp.engines.deepspeed.head_hooks import outer_loss_gradient
from megamtp.engines.pipeline import PipelineEngine
from megamtp.engines.spread_passes import SpreadPassRunner
from megamtp.planning.spread import SpreadPartition
from megamtp.planning.spread_schedule import PATTERNS, PassKind, SpreadSchedule, StagePass, TransferTimes


class SpreadPipelineEngine(PipelineEngine):
    """The Engine for engine.kind pipeline with engine.spread_losses."""

    partition: SpreadPartition

    def __init__(self, config: Config, partition: SpreadPartition | None = None):
        super().__init__(config, partition)
        self.transfers = self.partition.schedule.transfers()
        loss_gradient = partial(outer_loss_gradient, self.deepspeed_engine)
        self.runner = SpreadPassRunner(
            self.part, self.partition, self.stage_module.ranks, self.data_parallel_rank, loss_gradient
        )
        deepspeed_pipeline.replace_schedules(
            self.deepspeed_engine, self._training_passes, self._evaluation_passes, self.runner.run
        )

    def _begin(self, micro_batches: list[Batch], loss_scales: list[float]) -> None:
        super()._begin(micro_batches, loss_scales)
        if torch.is_grad_enabled():
            self.runner.begin(micro_batches, loss_scales, self.transfers, training=True)
        else:
            # The order of passes does not change the result: take the first pattern, without a search for the fastest.
            times = self.partition.schedule.times
            self.evaluation = SpreadSchedule(times, len(micro_batches), TransferTimes(), PATTERNS[0])
            self.runner.begin(micro_batches, loss_scales, self.evaluation.transfers(), training=False)

    def _training_passes(self) -> list[StagePass]:
        return self.partition.schedule.orders[self.runner.stage]

    def _evaluation_passes(self) -> list[StagePass]:
        stage_passes = self.evaluation.orders[self.runner.stage]
        return [stage_pass for stage_pass in stage_passes if stage_pass.kind != PassKind.BACKWARD]

    def _reduce_copies(self, engine: object) -> None:
        self.runner.finish()  # on all ranks, reductions start after all transfers
        super()._reduce_copies(engine)

    def _end(self) -> None:
        self.runner.finish()
