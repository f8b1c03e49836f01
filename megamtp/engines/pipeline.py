"""Pipeline and data parallelism with ZeRO-1 through DeepSpeed's 1F1B engine, with sequential heads on any of the last stages.

    stage 0: embedding, trunk ...   |   stage 1: ... trunk, head 1   |   stage 2: head 2 ... head n        x D pipelines

A stage runs its heads forward and backward when z passes (losses/sequential.py) and adds their dz when the gradient of z comes
back, so every stage runs one forward and one backward pass of each micro-batch, and sends one tensor each way.
"""

import itertools
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipelineEngine
from torch import Tensor

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import EngineState, StepResult, loss_scales, on_device
from megamtp.engines.deepspeed_config import deepspeed_config
from megamtp.engines.head_phase import backward_seed
from megamtp.engines.optimizer import adamw
from megamtp.engines.saved_state import engine_state, load_state
from megamtp.engines.stage import PipelineStage
from megamtp.losses.sequential import HeadPhase
from megamtp.losses.softmax_gradient import IGNORED
from megamtp.planning.loss_choice import compared
from megamtp.planning.partition import data_parallel_place, enough_micro_batches
from megamtp.planning.spread import best_cut


class PipelineEngine:
    """The Engine of engine.kind pipeline. torch.distributed must be initialised.

    Attributes:
        engine: DeepSpeed's own.
        model: this rank's PipelineStage inside it.
    """

    def __init__(self, config: Config):
        self.config = config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank, self.data_parallel_size = data_parallel_place(config, self.rank, self.world_size)
        self.device = torch.device(get_accelerator().current_device_name())
        self.cut = best_cut(config, self.data_parallel_size)
        deepspeed.init_distributed(verbose=False)  # wraps torch.distributed, before the stage asks for its groups
        self.model = self._make_stage()
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=adamw(config, self.model),
            config=deepspeed_config(config, self.data_parallel_size),
            dist_init_required=False,
        )
        if isinstance(self.engine.optimizer, BF16_Optimizer):
            self.engine.optimizer._update_hp_grad = partial(_add_gradient, self.engine.optimizer)
        self.model.head_phase = SeededHeads(self.engine)
        self.engine._INSTRUCTION_MAP = self.engine._INSTRUCTION_MAP | {schedule.ReduceTiedGrads: self._reduce_unembedding}
        if self.rank == 0:
            self._report()

    def train_batch(self, micro_batches: list[Batch], target_counts: list[int], lr: float) -> StepResult:
        """See Engine.train_batch."""
        scales = loss_scales(self.config.head_weights, target_counts, self.data_parallel_size, len(micro_batches))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        micro_batches = on_device(micro_batches, self.device)
        self._begin(micro_batches, scales)
        self.engine.train_batch(_inputs(micro_batches))
        self._end()
        return StepResult(self.model.nll_sums, float(self.engine.get_global_grad_norm()), self.engine.was_step_applied() is False)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See Engine.evaluate. As many batches as a step has micro-batches are in the pipeline together."""
        n, own = self.config.model.num_future_tokens, self.model.own.heads
        totals = torch.zeros(2, n, dtype=torch.float64, device=self.device)
        batches = iter(batches)
        while group := on_device(itertools.islice(batches, self.engine.micro_batches), self.device):
            self._begin(group, [1.0] * n)
            self.engine.eval_batch(
                _inputs(group), compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=len(group)
            )
            self._end()
            totals[0] += self.model.nll_sums
            for head in own:
                totals[1, head] += sum(int((batch.targets[head] != IGNORED).sum()) for batch in group)
        return totals.flatten()

    def state(self) -> EngineState:
        """See Engine.state."""
        return engine_state(self.engine)

    def load(self, checkpoint: Path) -> None:
        """See Engine.load."""
        load_state(self.engine, checkpoint, self.config.engine.kind, self.rank, self.world_size)

    def _reduce_unembedding(self, engine: DeepSpeedPipelineEngine) -> None:
        """Sums the gradients of all copies of the unembedding, once a step: when this stage has sent its last gradient upstream.

        The stages before it still have backward passes to run then, which hide the transfer. Over the stages of all pipelines in
        one, and the reduction over pipelines that follows adds zeros to it: so all copies get the same bits, and stay equal
        (on CPUs but for rounding at the ends of shards: see optimizer.py).
        DeepSpeed's own, over the stages of one pipeline, leaves the sum over pipelines to each stage's reduction, which may add in
        another order on another stage.

        Source: deepspeed/runtime/pipe/engine.py, _exec_reduce_tied_grads; schedule.py, TrainSchedule.
        """
        if not self.model.copies:
            return
        for parameter in self.model.copied_parameters:
            gradient = parameter._hp_grad if isinstance(engine.optimizer, BF16_Optimizer) else parameter.grad
            dist.all_reduce(gradient, group=self.model.copies)
            if self.data_parallel_rank > 0:
                gradient.zero_()

    def _make_stage(self) -> PipelineStage:
        return PipelineStage(self.config, self.cut, self.device)

    def _begin(self, micro_batches: list[Batch], loss_scales: list[float]) -> None:
        self.model.begin(micro_batches, loss_scales)

    def _end(self) -> None:
        """After the last pass of a step or an evaluation."""

    def _report(self) -> None:
        print(f"{self.cut.summary()}\n{compared(self.config, self.data_parallel_size, self.cut)}", flush=True)
        micro_batches = self.config.accumulation(self.data_parallel_size)
        enough = enough_micro_batches(len(self.cut.stages))
        if micro_batches < enough:
            print(
                f"megamtp: warning: {micro_batches} micro-batches a step are few for {len(self.cut.stages)} stages, which "
                f"have nothing to do for {self.cut.bubble:.0%} of it; expected {enough} or more: raise "
                "train.global_batch_tokens, or lower train.micro_batch_size or engine.num_stages",
                file=sys.stderr,
                flush=True,
            )


class SeededHeads(HeadPhase):
    """Heads' backward passes start as the last stage's will. Nothing else is needed: no gradient is reduced before the last one."""

    def __init__(self, engine: DeepSpeedPipelineEngine):
        self.engine = engine

    def seed(self) -> float:
        return backward_seed(self.engine)


def _inputs(micro_batches: list[Batch]) -> Iterable[tuple[Tensor, tuple]]:
    """(inputs, labels) as DeepSpeed's first and last stages load them; the heads have their targets from `begin`."""
    return iter([(batch.inputs, ()) for batch in micro_batches])


@torch.no_grad()
def _add_gradient(optimizer: BF16_Optimizer, parameter: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
    """Adds a micro-batch's gradient to the sum in fp32, without a copy of it in fp32: 10 bytes a parameter through memory, not 18.

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
