"""Runs our stages in DeepSpeed's pipeline engine: its module, its instructions and its sums of gradients.

Tests: tests/distributed/test_pipeline.py.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor, nn

from megamtp.cluster.environment import raised_by_all
from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.deepspeed.members import (
    Bf16Optimizer,
    DeepSpeedPipelineEngine,
    StageGrid,
    UnshardedParameter,
    is_bf16,
    unsharded,
)
from megamtp.engines.stage import StagePart, stage_part
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition
from megamtp.planning.spread_schedule import StagePass


class DeepSpeedStageModule(PipelineModule):
    """This rank's StagePart as a DeepSpeed module. DeepSpeed calls `forward` for each micro-batch.

    The constructor is collective. Parameters have the same names as in the part.

    Attributes:
        part: the StagePart.
        copies: parameters of this stage of which other stages hold copies, with all ranks that hold them: those of a
            shared unembedding, and of the embedding.
    """

    part: StagePart
    _grid: StageGrid

    def __init__(self, config: Config, partition: Partition | SpreadPartition, device: torch.device):
        self.config, self.partition, self.device = config, partition, device  # PipelineModule.__init__ calls _build
        deepspeed.init_distributed(verbose=False)  # wraps torch.distributed; PipelineModule creates groups
        names = [f"trunk.{index}" for index in range(config.model.num_trunk_layers)]
        names += [f"heads.{index}" for index in range(config.model.num_future_tokens)]
        with contextlib.redirect_stdout(io.StringIO()):  # PipelineModule prints the position of every rank
            PipelineModule.__init__(self, names, num_stages=len(partition.stages))
        self.copies = self._find_copies()

    def forward(self, x: Tensor) -> Tensor:
        """See StagePart.forward."""
        return self.part(x)

    @property
    def ranks(self) -> list[list[int]]:
        """The ranks of all stages, by pipeline."""
        pipelines = range(self._grid.get_data_parallel_world_size())
        stages = range(len(self.partition.stages))
        return [
            [self._grid.stage_to_global(stage_id=stage, data=pipeline) for stage in stages] for pipeline in pipelines
        ]

    def _partition_layers(self, method: str) -> None:
        """Overrides PipelineModule's method, to use our partition. Source: deepspeed/runtime/pipe/module.py."""
        this_stage = self.partition.stages[self._grid.get_stage_id()]
        self.parts = [0, *(stage.end for stage in self.partition.stages)]
        self._set_bounds(this_stage.first, this_stage.end)

    def _build(self) -> None:
        """Overrides PipelineModule's method. Adds the part's modules to this module, under the same names."""
        with raised_by_all():
            part = stage_part(self.config, self.partition, self._grid.get_stage_id(), self.device)
        object.__setattr__(self, "part", part)  # not as a submodule, which would prefix the parameters' names
        for name, module in part.named_children():
            self.add_module(name, module)
        for parameter in unsharded(self.parameters()):
            parameter.ds_pipe_replicated = False

    def _find_copies(self) -> list[tuple[list[nn.Parameter], dist.ProcessGroup]]:
        """Returns `copies`, and marks all but the first copy, so that norm and checkpoints have one. Collective."""
        stages, model, copies = self.partition.stages, self.config.model, []
        with_shared_unembedding = [stage for stage in stages if stage.heads and model.unembedding == "shared"]
        with_embedding = [
            stage for stage in stages if stage.contents.has_embedding or stage.contents.reads_tokens(model)
        ]
        for parameters, holders in (
            (self.part.copied_unembedding, with_shared_unembedding),
            (self.part.copied_embedding, with_embedding),
        ):
            if len(holders) < 2:
                continue
            group = dist.new_group(sorted(ranks[stages.index(stage)] for ranks in self.ranks for stage in holders))
            if self.part.stage in holders:
                copies.append((parameters, group))
            for parameter in unsharded(parameters) if self.part.stage is not holders[0] else ():
                parameter.ds_pipe_replicated = True
        return copies


def accumulate_gradients_in_place(engine: DeepSpeedPipelineEngine) -> None:
    """Makes the bf16 optimizer add gradients to their fp32 sums without converting them to fp32 first."""
    optimizer = engine.optimizer
    if is_bf16(optimizer):
        optimizer._update_hp_grad = partial(_add_gradient, optimizer)


@torch.no_grad()
def _add_gradient(
    optimizer: Bf16Optimizer, parameter: UnshardedParameter, group: int, index: int, clear_lp_grads: bool
) -> None:
    """Adds a micro-batch's gradient to its fp32 sum.

    Reads and writes 10 bytes per parameter. DeepSpeed's own function reads and writes 18, with the same result.

    Source: deepspeed/runtime/bf16_optimizer.py, _update_hp_grad.
    """
    if parameter.grad is None:
        return
    total = optimizer.fp32_groups_gradients[group][index]
    total.add_(parameter.grad.view(total.shape))
    parameter._hp_grad = total
    optimizer.fp32_groups_has_gradients[group][index] = True
    if clear_lp_grads:
        parameter.grad.zero_()


def accumulated_gradient(engine: DeepSpeedPipelineEngine, parameter: nn.Parameter) -> Tensor:
    """Returns the sum of a parameter's gradients over the micro-batches so far; not a copy."""
    (unsharded_parameter,) = unsharded([parameter])
    gradient = unsharded_parameter._hp_grad if is_bf16(engine.optimizer) else unsharded_parameter.grad
    assert gradient is not None
    return gradient


def replace_tied_reduction(engine: DeepSpeedPipelineEngine, reduce: Callable[[DeepSpeedPipelineEngine], None]) -> None:
    """Makes the engine call `reduce` instead of its own reduction of tied weights.

    The engine calls it once per step, after this stage has sent its last gradient.

    Source: deepspeed/runtime/pipe/engine.py, _exec_reduce_tied_grads; schedule.py, TrainSchedule.
    """
    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {schedule.ReduceTiedGrads: reduce}


def train_micro_batches(engine: DeepSpeedPipelineEngine, micro_batches: list[Batch]) -> None:
    """Runs one optimizer step."""
    engine.train_batch(_inputs(micro_batches))


def evaluate_micro_batches(engine: DeepSpeedPipelineEngine, micro_batches: list[Batch]) -> None:
    """Runs only forward passes. The losses stay in each stage's nll_sums."""
    engine.eval_batch(
        _inputs(micro_batches),
        compute_loss=False,
        reduce_output=None,
        bcast_loss=False,
        num_micro_batches=len(micro_batches),
    )


def _inputs(micro_batches: list[Batch]) -> Iterator[tuple[Tensor, tuple]]:
    """Returns the (inputs, labels) that DeepSpeed loads. Labels are empty: the heads get their targets from `begin`."""
    return iter([(batch.inputs, ()) for batch in micro_batches])


class RunPass(schedule.PipeInstruction):
    """Runs the pass `stage_pass` of our own schedule."""


class PassSchedule(schedule.PipeSchedule):
    """A DeepSpeed schedule of the given passes and, after them, the instructions `last`.

    It does not use DeepSpeed's activation buffers.
    """

    def __init__(self, stage_passes: list[StagePass], last: list[schedule.PipeInstruction]):
        self.stage_passes, self.last = stage_passes, last

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        yield from ([RunPass(stage_pass=stage_pass)] for stage_pass in self.stage_passes)
        yield self.last

    def __iter__(self) -> Iterator[list[schedule.PipeInstruction]]:
        return self.steps()

    def num_pipe_buffers(self) -> int:
        return 1


def replace_schedules(
    engine: DeepSpeedPipelineEngine,
    training_passes: Callable[[], list[StagePass]],
    evaluation_passes: Callable[[], list[StagePass]],
    run: Callable[[StagePass], None],
) -> None:
    """Makes the engine run our passes instead of the 1F1B schedule.

    Args:
        training_passes, evaluation_passes: return this stage's passes of a step and of an evaluation, in their order.
        run: runs a pass.

    Source: deepspeed/runtime/pipe/engine.py, _train_schedule, _inference_schedule, _exec_schedule.
    """
    after_step = [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]

    def run_pass(engine: DeepSpeedPipelineEngine, stage_pass: StagePass) -> None:
        if engine.is_last_stage():
            # DeepSpeed reports total_loss; our losses are in nll_sums.
            engine.total_loss = torch.zeros((), device=engine.device)
        engine._running_engine_backward = True  # DeepSpeed sets it during its own backward passes
        try:
            run(stage_pass)
        finally:
            engine._running_engine_backward = False

    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {RunPass: run_pass}
    engine._train_schedule = lambda: PassSchedule(training_passes(), after_step)
    engine._inference_schedule = lambda num_micro_batches: PassSchedule(evaluation_passes(), [])
