"""Pipeline and data parallelism with ZeRO-1 through DeepSpeed's 1F1B engine. The last stages run the heads.

    stage 0: embedding, trunk ...   |   stage 1: ... trunk, head 1   |   stage 2: head 2 ... head n

With data parallelism, several such pipelines run at the same time.

A stage with heads runs their forward and backward passes during its forward pass (losses/sequential.py), and adds their
dz to the gradient of z in its backward pass. So every stage runs one forward and one backward pass of each micro-batch,
and sends one tensor in each direction.

Tests: tests/distributed/test_pipeline.py.
"""

import itertools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.config import Config
from megamtp.console import print_line, print_warning
from megamtp.data.loader import Batch
from megamtp.engines.base import StepResult, loss_scales, move_to_device
from megamtp.engines.deepspeed import pipeline as deepspeed_pipeline
from megamtp.engines.deepspeed.head_hooks import PipelineHeadHooks
from megamtp.engines.deepspeed.host import set_learning_rate
from megamtp.engines.deepspeed.members import DeepSpeedPipelineEngine
from megamtp.engines.hosted import HostedEngine
from megamtp.planning.loss_choice import describe_other_placement
from megamtp.planning.partition import Partition, data_parallel_rank_and_size, enough_micro_batches
from megamtp.planning.spread import SpreadPartition, best_partition
from megamtp.targets import IGNORED


class PipelineEngine(HostedEngine):
    """The Engine for engine.kind pipeline. torch.distributed must be initialised.

    Args:
        partition: the stages. None: the best partition.

    Attributes:
        stage_module: the module that DeepSpeed runs.
        part: this rank's StagePart, which that module runs.
    """

    deepspeed_engine: DeepSpeedPipelineEngine

    def __init__(self, config: Config, partition: Partition | SpreadPartition | None = None):
        super().__init__(config, data_parallel_rank_and_size(config, dist.get_rank(), dist.get_world_size()))
        self.partition = partition or best_partition(config, self.data_parallel_size)
        self.stage_module = deepspeed_pipeline.DeepSpeedStageModule(config, self.partition, self.device)
        self.part = self.stage_module.part
        self.attach_model(self.stage_module)
        deepspeed_pipeline.accumulate_gradients_in_place(self.deepspeed_engine)
        self.part.head_hooks = PipelineHeadHooks(self.deepspeed_engine)
        deepspeed_pipeline.replace_tied_reduction(self.deepspeed_engine, self._reduce_copies)
        if self.rank == 0:
            self._report()

    def train_batch(self, micro_batches: list[Batch], target_counts: list[int], lr: float) -> StepResult:
        """See Engine.train_batch."""
        scales = loss_scales(self.config.head_weights, target_counts, self.data_parallel_size, len(micro_batches))
        set_learning_rate(self.deepspeed_engine, lr)
        micro_batches = move_to_device(micro_batches, self.device)
        self._begin(micro_batches, scales)
        deepspeed_pipeline.train_micro_batches(self.deepspeed_engine, micro_batches)
        self._end()
        return self.step_result(self.part.nll_sums)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See Engine.evaluate. Runs the batches in groups of one step's number of micro-batches."""
        n = self.config.model.num_future_tokens
        totals = torch.zeros(2, n, dtype=torch.float64, device=self.device)
        batches = iter(batches)
        while group := move_to_device(itertools.islice(batches, self.deepspeed_engine.micro_batches), self.device):
            self._begin(group, [1.0] * n)
            deepspeed_pipeline.evaluate_micro_batches(self.deepspeed_engine, group)
            self._end()
            totals[0] += self.part.nll_sums
            for head in self.part.stage.heads:
                totals[1, head] += sum(int((batch.targets[head] != IGNORED).sum()) for batch in group)
        return totals.flatten()

    def _reduce_copies(self, engine: object) -> None:
        """Sums the gradients of all copies of the unembedding, and of the embedding, once per step.

        DeepSpeed calls it on each stage after the stage has sent its last gradient upstream. The all-reduce runs while
        earlier stages still run backward passes.

        One all-reduce sums over all stages with a copy of all pipelines. DeepSpeed then reduces every gradient over the
        pipelines. All pipelines except for the first set the gradient to zero before that, so that this second sum
        changes nothing. All copies get the same bits and stay equal (on CPUs except for rounding at the ends of shards:
        see optimizers/adamw.py). DeepSpeed's own reduction of tied weights sums over the stages of one pipeline only.
        Each stage would then sum over the pipelines, possibly in another order than other stages.
        """
        for parameters, group in self.stage_module.copies:
            for parameter in parameters:
                gradient = deepspeed_pipeline.accumulated_gradient(self.deepspeed_engine, parameter)
                dist.all_reduce(gradient, group=group)
                if self.data_parallel_rank > 0:
                    gradient.zero_()

    def _begin(self, micro_batches: list[Batch], loss_scales: list[float]) -> None:
        """Prepares a step or an evaluation. Called before its first pass."""
        self.part.quantise_weights()
        self.part.begin(micro_batches, loss_scales)

    def _end(self) -> None:
        """Ends a step or an evaluation. Called after its last pass; a subclass may override it."""

    def _report(self) -> None:
        other = describe_other_placement(self.config, self.data_parallel_size, self.partition)
        print_line(f"{self.partition.summary()}\n{other}")
        num_micro_batches = self.config.num_micro_batches(self.data_parallel_size)
        num_stages = len(self.partition.stages)
        enough = enough_micro_batches(num_stages)
        if num_micro_batches < enough:
            print_warning(
                f"a step has {num_micro_batches} micro-batches, so the {num_stages} stages are idle for "
                f"{self.partition.bubble:.0%} of it; expected {enough} or more: raise train.global_batch_tokens, or "
                "lower train.micro_batch_size or engine.num_stages"
            )
