"""The pipeline engine with losses spread by vocabulary: DeepSpeed's executor, optimizer and reductions, but our own
schedule.

DeepSpeed's 1F1B has no place for a loss whose answer comes later, from all stages; its pipeline engine takes any
schedule, though, and instructions that it did not know.

Tests: tests/distributed/test_spread_pipeline.py.
"""

from functools import partial

import torch

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.deepspeed import pipeline as hosting
from megamtp.engines.deepspeed.head_phase import backward_seed
from megamtp.engines.pipeline import PipelineEngine
from megamtp.engines.spread_passes import SpreadPasses
from megamtp.planning.spread import SpreadPartition
from megamtp.planning.spread_schedule import PATTERNS, Exchange, Kind, Pass, SpreadSchedule


class SpreadPipelineEngine(PipelineEngine):
    """The Engine of engine.kind pipeline with engine.spread_losses."""

    cut: SpreadPartition

    def __init__(self, config: Config, cut: SpreadPartition | None = None):
        super().__init__(config, cut)
        self.transfers = self.cut.schedule.transfers()
        self.passes = SpreadPasses(
            self.part, self.cut, self.stage.ranks, self.data_parallel_rank, partial(backward_seed, self.engine)
        )
        hosting.replace_schedules(self.engine, self._training_passes, self._evaluation_passes, self.passes.run)

    def _begin(self, micro_batches: list[Batch], loss_scales: list[float]) -> None:
        super()._begin(micro_batches, loss_scales)
        if torch.is_grad_enabled():
            self.passes.begin(micro_batches, loss_scales, self.transfers, learning=True)
        else:
            self.evaluation = SpreadSchedule(self.cut.schedule.times, len(micro_batches), Exchange(), PATTERNS[0])
            self.passes.begin(micro_batches, loss_scales, self.evaluation.transfers(), learning=False)

    def _training_passes(self) -> list[Pass]:
        return self.cut.schedule.orders[self.passes.stage]

    def _evaluation_passes(self) -> list[Pass]:
        return [work for work in self.evaluation.orders[self.passes.stage] if work.kind != Kind.BACKWARD]

    def _reduce_unembedding(self, engine: object) -> None:
        self.passes.finish()  # reductions are transfers, too: after all others, on all ranks
        super()._reduce_unembedding(engine)

    def _end(self) -> None:
        self.passes.finish()
