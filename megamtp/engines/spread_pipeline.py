"""The pipeline engine with losses spread by vocabulary: DeepSpeed's executor, optimizer and reductions, but our own schedule.

DeepSpeed's 1F1B has no place for a loss whose answer comes later, from all stages; its pipeline engine takes any schedule, though,
and instructions that it did not know. Source: deepspeed/runtime/pipe/engine.py, _train_schedule, _exec_schedule.
"""

from collections.abc import Iterator
from functools import partial

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipelineEngine

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.head_phase import backward_seed
from megamtp.engines.pipeline import PipelineEngine
from megamtp.engines.spread_passes import SpreadPasses
from megamtp.engines.spread_stage import SpreadStage
from megamtp.planning.spread_schedule import PATTERNS, Exchange, Kind, Pass, SpreadSchedule


class RunPass(schedule.PipeInstruction):
    """`work`: a Pass of this stage."""


class Passes(schedule.PipeSchedule):
    """Passes in a given order, and what follows the last of them. `buffers` are DeepSpeed's, which nobody uses."""

    def __init__(self, works: list[Pass], last: list[schedule.PipeInstruction]):
        self.works, self.last = works, last

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        yield from ([RunPass(work=work)] for work in self.works)
        yield self.last

    def __iter__(self) -> Iterator[list[schedule.PipeInstruction]]:
        return self.steps()

    def num_pipe_buffers(self) -> int:
        return 1


class SpreadPipelineEngine(PipelineEngine):
    """The Engine of engine.kind pipeline with engine.spread_losses."""

    def __init__(self, config: Config):
        super().__init__(config)
        stages, pipelines = range(len(self.cut.stages)), range(self.data_parallel_size)
        place = self.model._grid.stage_to_global
        ranks = [[place(stage_id=stage, data=pipeline) for stage in stages] for pipeline in pipelines]
        self.transfers = self.cut.schedule.transfers()
        self.passes = SpreadPasses(self.model, ranks, self.data_parallel_rank, partial(backward_seed, self.engine))
        self.engine._INSTRUCTION_MAP = self.engine._INSTRUCTION_MAP | {RunPass: self._run}
        self.engine._train_schedule = self._train_schedule
        self.engine._inference_schedule = self._inference_schedule

    def _make_stage(self) -> SpreadStage:
        return SpreadStage(self.config, self.cut, self.device)

    def _begin(self, micro_batches: list[Batch], loss_scales: list[float]) -> None:
        super()._begin(micro_batches, loss_scales)
        if torch.is_grad_enabled():
            self.passes.begin(micro_batches, loss_scales, self.transfers, learning=True)
        else:
            self.evaluation = SpreadSchedule(self.cut.schedule.times, len(micro_batches), Exchange(), PATTERNS[0])
            self.passes.begin(micro_batches, loss_scales, self.evaluation.transfers(), learning=False)

    def _train_schedule(self) -> Passes:
        last = [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]
        return Passes(self.cut.schedule.orders[self.model.stage_id], last)

    def _inference_schedule(self, micro_batches: int) -> Passes:
        return Passes([work for work in self.evaluation.orders[self.model.stage_id] if work.kind != Kind.BACKWARD], [])

    def _reduce_unembedding(self, engine: DeepSpeedPipelineEngine) -> None:
        self.passes.finish()  # reductions are transfers, too: after all others, on all ranks
        super()._reduce_unembedding(engine)

    def _run(self, engine: DeepSpeedPipelineEngine, work: Pass) -> None:
        if engine.is_last_stage():
            engine.total_loss = torch.zeros((), device=self.device)  # DeepSpeed wants one to report; ours are in nll_sums
        engine._running_engine_backward = True  # as DeepSpeed does around backward passes of its own
        try:
            self.passes.run(work)
        finally:
            engine._running_engine_backward = False

    def _end(self) -> None:
        self.passes.finish()
