"""Pipeline and data parallelism with ZeRO-1 through DeepSpeed's 1F1B engine, with sequential heads on any of the last
stages.

    stage 0: embedding, trunk ...   |   stage 1: ... trunk, head 1   |   stage 2: head 2 ... head n        x D pipelines

A stage runs its heads forward and backward when z passes (losses/sequential.py) and adds their dz when the gradient of
z comes back, so every stage runs one forward and one backward pass of each micro-batch, and sends one tensor each way.

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
from megamtp.engines.base import StepResult, loss_scales, on_device
from megamtp.engines.deepspeed import pipeline as hosting
from megamtp.engines.deepspeed.head_phase import SeededHeads
from megamtp.engines.deepspeed.host import set_learning_rate
from megamtp.engines.deepspeed.members import HostPipelineEngine
from megamtp.engines.hosted import HostedEngine
from megamtp.planning.loss_choice import compared
from megamtp.planning.partition import Partition, data_parallel_place, enough_micro_batches
from megamtp.planning.spread import SpreadPartition, best_cut
from megamtp.targets import IGNORED


class PipelineEngine(HostedEngine):
    """The Engine of engine.kind pipeline. torch.distributed must be initialised.

    Args:
        cut: the stages; None: the best cut.

    Attributes:
        part: this rank's StagePart.
    """

    engine: HostPipelineEngine

    def __init__(self, config: Config, cut: Partition | SpreadPartition | None = None):
        super().__init__(config, data_parallel_place(config, dist.get_rank(), dist.get_world_size()))
        self.cut = cut or best_cut(config, self.data_parallel_size)
        self.stage = hosting.PipelineStage(config, self.cut, self.device)
        self.part = self.stage.part
        self.host(self.stage)
        hosting.sum_gradients_in_place(self.engine)
        self.part.head_phase = SeededHeads(self.engine)
        hosting.replace_tied_reduction(self.engine, self._reduce_unembedding)
        if self.rank == 0:
            self._report()

    def train_batch(self, micro_batches: list[Batch], target_counts: list[int], lr: float) -> StepResult:
        """See Engine.train_batch."""
        scales = loss_scales(self.config.head_weights, target_counts, self.data_parallel_size, len(micro_batches))
        set_learning_rate(self.engine, lr)
        micro_batches = on_device(micro_batches, self.device)
        self._begin(micro_batches, scales)
        hosting.train_micro_batches(self.engine, micro_batches)
        self._end()
        return self.step_result(self.part.nll_sums)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See Engine.evaluate. As many batches as a step has micro-batches are in the pipeline together."""
        n, own = self.config.model.num_future_tokens, self.part.own.heads
        totals = torch.zeros(2, n, dtype=torch.float64, device=self.device)
        batches = iter(batches)
        while group := on_device(itertools.islice(batches, self.engine.micro_batches), self.device):
            self._begin(group, [1.0] * n)
            hosting.evaluate_micro_batches(self.engine, group)
            self._end()
            totals[0] += self.part.nll_sums
            for head in own:
                totals[1, head] += sum(int((batch.targets[head] != IGNORED).sum()) for batch in group)
        return totals.flatten()

    def _reduce_unembedding(self, engine: object) -> None:
        """Sums the gradients of all copies of the unembedding, once a step: when this stage has sent its last gradient
        upstream.

        The stages before it still have backward passes to run then, which hide the transfer. Over the stages of all
        pipelines in one, and the reduction over pipelines that follows adds zeros to it: so all copies get the same
        bits, and stay equal (on CPUs but for rounding at the ends of shards: see optimizers/adamw.py).
        DeepSpeed's own, over the stages of one pipeline, leaves the sum over pipelines to each stage's reduction, which
        may add in another order on another stage.
        """
        if not self.stage.copies:
            return
        for parameter in self.part.copied_parameters:
            gradient = hosting.summed_gradient(self.engine, parameter)
            dist.all_reduce(gradient, group=self.stage.copies)
            if self.data_parallel_rank > 0:
                gradient.zero_()

    def _begin(self, micro_batches: list[Batch], loss_scales: list[float]) -> None:
        self.part.begin(micro_batches, loss_scales)

    def _end(self) -> None:
        """After the last pass of a step or an evaluation."""

    def _report(self) -> None:
        print_line(f"{self.cut.summary()}\n{compared(self.config, self.data_parallel_size, self.cut)}")
        micro_batches = self.config.accumulation(self.data_parallel_size)
        enough = enough_micro_batches(len(self.cut.stages))
        if micro_batches < enough:
            print_warning(
                f"{micro_batches} micro-batches a step are few for {len(self.cut.stages)} stages, which "
                f"have nothing to do for {self.cut.bubble:.0%} of it; expected {enough} or more: raise "
                "train.global_batch_tokens, or lower train.micro_batch_size or engine.num_stages"
            )
