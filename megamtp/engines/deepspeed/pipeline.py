"""DeepSpeed's pipeline engine with a stage of ours inside: its module, its instructions and its sums of gradients.

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
    HostPipelineEngine,
    StageGrid,
    UnshardedParameter,
    is_bf16,
    unsharded,
)
from megamtp.engines.stage import StagePart, stage_part
from megamtp.planning.partition import Partition
from megamtp.planning.spread import SpreadPartition
from megamtp.planning.spread_schedule import Pass


class PipelineStage(PipelineModule):
    """This rank's StagePart as DeepSpeed's module; `forward` is what it calls for each micro-batch.

    Collective: all ranks build their stages together. Parameters have the names they have in the part.

    Attributes:
        part: the StagePart.
        copies: group of all ranks with a copy of the unembedding, on several stages; None if it is on one, or not here.
    """

    part: StagePart
    _grid: StageGrid

    def __init__(self, config: Config, cut: Partition | SpreadPartition, device: torch.device):
        self.config, self.cut, self.device = config, cut, device  # before PipelineModule's own, which calls _build
        deepspeed.init_distributed(verbose=False)  # wraps torch.distributed, before the stage asks for its groups
        names = [f"trunk.{index}" for index in range(config.model.num_trunk_layers)]
        names += [f"heads.{index}" for index in range(config.model.num_future_tokens)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the place of every rank
            PipelineModule.__init__(self, names, num_stages=len(cut.stages))
        self.copies = self._copies()

    def forward(self, x: Tensor) -> Tensor:
        """See StagePart.forward."""
        return self.part(x)

    @property
    def ranks(self) -> list[list[int]]:
        """The ranks of all stages, by pipeline."""
        pipelines = range(self._grid.get_data_parallel_world_size())
        stages = range(len(self.cut.stages))
        return [
            [self._grid.stage_to_global(stage_id=stage, data=pipeline) for stage in stages] for pipeline in pipelines
        ]

    def _partition_layers(self, method: str) -> None:
        """PipelineModule's, with our cut. Source: deepspeed/runtime/pipe/module.py."""
        own = self.cut.stages[self._grid.get_stage_id()]
        self.parts = [0, *(stage.end for stage in self.cut.stages)]
        self._set_bounds(own.first, own.end)

    def _build(self) -> None:
        """PipelineModule's. The part's modules become this module's own, under their names."""
        with raised_by_all():
            part = stage_part(self.config, self.cut, self._grid.get_stage_id(), self.device)
        object.__setattr__(self, "part", part)  # not as a submodule, which would be part of the names
        for name, module in part.named_children():
            self.add_module(name, module)
        for parameter in unsharded(self.parameters()):
            parameter.ds_pipe_replicated = False
        for parameter in unsharded(part.copied_parameters) if part.own.heads.start > 0 else ():
            parameter.ds_pipe_replicated = True  # the gradient's norm counts the first copy alone

    def _copies(self) -> dist.ProcessGroup | None:
        stages = [index for index, stage in enumerate(self.cut.stages) if stage.heads]
        if len(stages) == 1:
            return None
        ranks = sorted(of_stages[stage] for of_stages in self.ranks for stage in stages)
        group = dist.new_group(ranks)
        return group if self.part.own.heads else None


def sum_gradients_in_place(engine: HostPipelineEngine) -> None:
    """Makes the bf16 optimizer add gradients to their fp32 sums without a copy of them in fp32."""
    optimizer = engine.optimizer
    if is_bf16(optimizer):
        optimizer._update_hp_grad = partial(_add_gradient, optimizer)


@torch.no_grad()
def _add_gradient(
    optimizer: Bf16Optimizer, parameter: UnshardedParameter, group: int, index: int, clear_lp_grads: bool
) -> None:
    """Adds a micro-batch's gradient to the sum in fp32: 10 bytes a parameter through memory, not 18.

    The same bits as DeepSpeed's. Source: deepspeed/runtime/bf16_optimizer.py, _update_hp_grad.
    """
    if parameter.grad is None:
        return
    total = optimizer.fp32_groups_gradients[group][index]
    total.add_(parameter.grad.view(total.shape))
    parameter._hp_grad = total
    optimizer.fp32_groups_has_gradients[group][index] = True
    if clear_lp_grads:
        parameter.grad.zero_()


def summed_gradient(engine: HostPipelineEngine, parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient over the micro-batches so far, in place."""
    (own,) = unsharded([parameter])
    gradient = own._hp_grad if is_bf16(engine.optimizer) else own.grad
    assert gradient is not None
    return gradient


def replace_tied_reduction(engine: HostPipelineEngine, reduce: Callable[[HostPipelineEngine], None]) -> None:
    """`reduce` takes the place of DeepSpeed's reduction of tied weights, once a step when this stage has sent its last
    gradient.

    Source: deepspeed/runtime/pipe/engine.py, _exec_reduce_tied_grads; schedule.py, TrainSchedule.
    """
    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {schedule.ReduceTiedGrads: reduce}


def train_micro_batches(engine: HostPipelineEngine, micro_batches: list[Batch]) -> None:
    """One step."""
    engine.train_batch(_inputs(micro_batches))


def evaluate_micro_batches(engine: HostPipelineEngine, micro_batches: list[Batch]) -> None:
    """Forward passes alone; the losses are in the stages."""
    engine.eval_batch(
        _inputs(micro_batches),
        compute_loss=False,
        reduce_output=None,
        bcast_loss=False,
        num_micro_batches=len(micro_batches),
    )


def _inputs(micro_batches: list[Batch]) -> Iterator[tuple[Tensor, tuple]]:
    """(inputs, labels) as DeepSpeed's first and last stages load them; the heads have their targets from `begin`."""
    return iter([(batch.inputs, ()) for batch in micro_batches])


class RunPass(schedule.PipeInstruction):
    """`work`: a pass of a schedule of ours."""


class Passes(schedule.PipeSchedule):
    """Passes in a given order, and what follows the last of them. `buffers` are DeepSpeed's, which are not used."""

    def __init__(self, works: list[Pass], last: list[schedule.PipeInstruction]):
        self.works, self.last = works, last

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        yield from ([RunPass(work=work)] for work in self.works)
        yield self.last

    def __iter__(self) -> Iterator[list[schedule.PipeInstruction]]:
        return self.steps()

    def num_pipe_buffers(self) -> int:
        return 1


def replace_schedules(
    engine: HostPipelineEngine,
    train: Callable[[], list[Pass]],
    evaluate: Callable[[], list[Pass]],
    run: Callable[[Pass], None],
) -> None:
    """The engine runs passes of ours instead of 1F1B.

    Args:
        train, evaluate: this stage's passes of a step, and of an evaluation, in their order.
        run: runs one of them.

    Source: deepspeed/runtime/pipe/engine.py, _train_schedule, _inference_schedule, _exec_schedule.
    """
    after_step = [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]

    def run_pass(engine: HostPipelineEngine, work: Pass) -> None:
        if engine.is_last_stage():
            engine.total_loss = torch.zeros((), device=engine.device)  # DeepSpeed reports one; ours are in nll_sums
        engine._running_engine_backward = True  # as DeepSpeed does around backward passes of its own
        try:
            run(work)
        finally:
            engine._running_engine_backward = False

    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {RunPass: run_pass}
    engine._train_schedule = lambda: Passes(train(), after_step)
    engine._inference_schedule = lambda micro_batches: Passes(evaluate(), [])
