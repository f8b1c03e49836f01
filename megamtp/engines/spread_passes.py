"""Runs a stage's passes in a pipeline with spread losses, and its transfers with other stages.

    pass        receives                                     sends
    FORWARD     ACTIVATIONS of the previous stage            ACTIVATIONS to the next stage, HIDDEN to all slices
    STATISTICS  HIDDEN of the heads of one stage             STATISTICS of this slice to all slices
    GRADIENTS   STATISTICS of all slices                     HIDDEN_GRADIENT to the stage with the heads
    BACKWARD    HIDDEN_GRADIENT, GRADIENT of the next stage  GRADIENT to the previous stage

planning/spread_schedule.py describes the passes and decides their order.

Tests: tests/distributed/test_spread_pipeline.py.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES
from megamtp.engines.stage import StagePart
from megamtp.engines.transfer_queue import TransferQueue
from megamtp.losses.float8 import Float8Products, Float8Weight
from megamtp.losses.linear_cross_entropy import accumulation_dtype
from megamtp.losses.vocabulary_slice import combine_statistics
from megamtp.planning.spread import SpreadPartition
from megamtp.planning.spread_schedule import NEIGHBOUR_OFFSET, PassKind, StagePass, Transfer, TransferKind

BACKWARD_TRANSFERS = (TransferKind.HIDDEN_GRADIENT, TransferKind.GRADIENT)  # not in an evaluation
MAX_QUEUED_PASSES = 8
MAX_TRANSFER_CTAS = 4  # multiprocessors that a transfer may occupy; NCCL's default is 16 or more


@dataclass
class SliceLosses:
    """The losses of one stage's heads for one micro-batch, in this stage's slice of the unembedding.

    Attributes:
        hidden: [N, D] for each head.
        logits: [N, R] for each head; an empty list if this stage has no rows of the unembedding.
        products: fp8 products for each head, or None for a head in the model's dtype; an empty list without rows.
    """

    hidden: list[Tensor]
    logits: list[Tensor]
    products: list[Float8Products | None]


@dataclass
class MicroBatchState:
    """The data of a micro-batch in flight.

    Attributes:
        received: the input of this stage's layers; a leaf of autograd.
        sent: the output of the trunk layers, for the next stage.
        normed: the normed outputs of the heads, for all slices.
        num_gradient_passes_left: number of GRADIENTS passes that have not run yet; there is one per stage with heads.
        losses: by the stage with the heads.
        d_weights: fp32 gradients of this stage's rows of each unembedding, summed over the GRADIENTS passes so far.
    """

    received: Tensor
    sent: Tensor
    normed: list[Tensor]
    num_gradient_passes_left: int
    losses: dict[int, SliceLosses] = field(default_factory=dict)
    d_weights: dict[nn.Parameter, Tensor] = field(default_factory=dict)


class SpreadPassRunner:
    """Runs the passes of one stage. Collective: all ranks construct it together and follow one schedule.

    Args:
        ranks: the ranks of all stages, by pipeline.
        pipeline: index of this rank's pipeline.
        loss_gradient: see HeadHooks.loss_gradient.
    """

    def __init__(
        self,
        part: StagePart,
        partition: SpreadPartition,
        ranks: list[list[int]],
        pipeline: int,
        loss_gradient: Callable[[], float],
    ):
        self.part, self.partition, self.ranks, self.loss_gradient = part, partition, ranks[pipeline], loss_gradient
        self.schedule, self.stage = partition.schedule, partition.stages.index(part.stage)
        self.stream = torch.cuda.Stream() if part.device.type == "cuda" else None
        for index, stage_ranks in enumerate(ranks):
            group = _new_group(stage_ranks)
            loss_group = _new_group([stage_ranks[stage] for stage in self.schedule.loss_stages])
            if index == pipeline:
                self.group, self.loss_group = group, loss_group

    def begin(
        self, micro_batches: list[Batch], loss_scales: list[float], transfers: list[Transfer], training: bool
    ) -> None:
        """Begins a step, or an evaluation if not `training`.

        Args:
            micro_batches: the micro-batches of the step or evaluation, on the device.
            loss_scales: one factor per head; see MTPModel.forward.
            transfers: all transfers of the schedule, in order.
        """
        self.batches, self.loss_scales, self.training = micro_batches, loss_scales, training
        self.states: dict[int, MicroBatchState] = {}  # by the index of the micro-batch
        # by unembedding; weights do not change within a step
        self.float8_weights: defaultdict[nn.Parameter, Float8Weight] = defaultdict(Float8Weight)
        self.queued_passes: deque[torch.cuda.Event] = deque()  # the ends of passes that the GPU may not have finished
        schedule, stage = self.schedule, self.stage
        own_transfers = [
            transfer
            for transfer in transfers
            if schedule.takes_part(stage, transfer) and (training or transfer.kind not in BACKWARD_TRANSFERS)
        ]
        self.queue = TransferQueue(
            self.stream, own_transfers, lambda transfer: schedule.sends(stage, transfer), self._start_transfer
        )

    def run(self, stage_pass: StagePass) -> None:
        """Runs one pass. The passes of a step must run in the schedule's order.

        On a GPU, the CPU runs at most MAX_QUEUED_PASSES ahead, because the data of queued passes stay in memory.
        """
        if self.stream and len(self.queued_passes) == MAX_QUEUED_PASSES:
            self.queued_passes.popleft().synchronize()
        if stage_pass.kind == PassKind.FORWARD:
            self._forward(stage_pass.micro_batch)
        elif stage_pass.kind == PassKind.STATISTICS:
            self._statistics(self.states[stage_pass.micro_batch], stage_pass)
        elif stage_pass.kind == PassKind.GRADIENTS:
            self._gradients(self.states[stage_pass.micro_batch], stage_pass)
        else:
            self._backward(self.states.pop(stage_pass.micro_batch), stage_pass.micro_batch)
        if self.stream:
            self.queued_passes.append(torch.cuda.current_stream().record_event())

    def finish(self) -> None:
        """Waits until all data are sent. Called after the last pass."""
        self.queue.finish()
        self.states.clear()

    def _forward(self, index: int) -> None:
        batch = self.batches[index]
        x = batch.inputs
        if self.stage:
            (x,) = self.queue.get(Transfer(TransferKind.ACTIVATIONS, self.stage - 1, index))
            x.requires_grad_(self.training)
        sent, normed = self.part.run_layers(x, batch)
        if self.training or self.stage in self.schedule.loss_stages:
            self.states[index] = MicroBatchState(x, sent, normed, len(self.schedule.head_stages))
        if self.stage + 1 < len(self.ranks):
            self.queue.put(Transfer(TransferKind.ACTIVATIONS, self.stage, index), [sent.detach()])
        if normed:
            self.queue.put(Transfer(TransferKind.HIDDEN, self.stage, index), [hidden.detach() for hidden in normed])

    @torch.no_grad()
    def _statistics(self, state: MicroBatchState, stage_pass: StagePass) -> None:
        head_stage, micro_batch = stage_pass.head_stage, stage_pass.micro_batch
        hidden = state.normed
        if head_stage != self.stage:
            hidden = self.queue.get(Transfer(TransferKind.HIDDEN, head_stage, micro_batch))
        losses, statistics = SliceLosses([tensor.detach().flatten(0, -2) for tensor in hidden], [], []), []
        targets = self._targets(stage_pass)
        for head, hidden_ND, targets_N in zip(self._heads(head_stage), losses.hidden, targets, strict=True):
            if self.part.extent.rows:
                if self.training:  # evaluations stay in the model's dtype, so that their losses are comparable
                    float8_weight = self.float8_weights[self.part.unembedding_weight(head)]
                    products = self.part.slice_products(head, hidden_ND, float8_weight, self._factor(head))
                else:
                    products = None
                logits_NR, statistics_3N = self.part.slice_statistics(head, hidden_ND, targets_N, products)
                losses.logits.append(logits_NR)
                losses.products.append(products)
            else:
                statistics_3N = torch.zeros(
                    3, len(hidden_ND), dtype=accumulation_dtype(hidden_ND.dtype), device=hidden_ND.device
                )
                statistics_3N[0] = -torch.inf
            statistics.append(statistics_3N)
        self.queue.put(Transfer(TransferKind.STATISTICS, head_stage, micro_batch), [torch.stack(statistics)])
        state.losses[head_stage] = losses

    def _factor(self, head: int) -> float:
        """Returns the factor of the gradient with respect to a head's logits."""
        return self.loss_scales[head] * self.loss_gradient()

    @torch.no_grad()
    def _gradients(self, state: MicroBatchState, stage_pass: StagePass) -> None:
        head_stage, micro_batch = stage_pass.head_stage, stage_pass.micro_batch
        losses, d_hidden = state.losses.pop(head_stage), []
        (statistics,) = self.queue.get(Transfer(TransferKind.STATISTICS, head_stage, micro_batch))
        for local_index, (head, targets_N) in enumerate(
            zip(self._heads(head_stage), self._targets(stage_pass), strict=True)
        ):
            nll_N, log_partition_N = combine_statistics(statistics[:, local_index], targets_N)
            if head_stage == self.stage:
                self.part.nll_sums[head] += nll_N.sum()
            if self.training:
                d_hidden.append(self._slice_gradients(state, losses, local_index, head, targets_N, log_partition_N))
        if self.training:
            self.queue.put(Transfer(TransferKind.HIDDEN_GRADIENT, head_stage, micro_batch), d_hidden)
        state.num_gradient_passes_left -= 1
        is_shared = self.part.unembedding is not None
        while state.d_weights and (state.num_gradient_passes_left == 0 or not is_shared):
            weight, gradient = state.d_weights.popitem()
            with torch.enable_grad():  # through autograd, so that DeepSpeed's gradient hooks run
                torch.autograd.backward(weight.view_as(weight), gradient.to(weight.dtype))
        if not self.training and state.num_gradient_passes_left == 0:
            self.states.pop(micro_batch)

    def _slice_gradients(
        self,
        state: MicroBatchState,
        losses: SliceLosses,
        local_index: int,
        head: int,
        targets_N: Tensor,
        log_partition_N: Tensor,
    ) -> Tensor:
        hidden_ND = losses.hidden[local_index]
        if not self.part.extent.rows:
            return torch.zeros_like(hidden_ND)
        weight = self.part.unembedding_weight(head)
        if weight not in state.d_weights:
            state.d_weights[weight] = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))
        logits_NR, products, factor = losses.logits[local_index], losses.products[local_index], self._factor(head)
        return self.part.slice_gradients(
            head, logits_NR, hidden_ND, targets_N, log_partition_N, state.d_weights[weight], factor, products
        )

    def _backward(self, state: MicroBatchState, index: int) -> None:
        outputs, gradients = list(state.normed), []
        if outputs:
            d_hidden = self.queue.get(Transfer(TransferKind.HIDDEN_GRADIENT, self.stage, index))
            gradients += [gradient.view_as(output) for gradient, output in zip(d_hidden, outputs, strict=True)]
        if self.stage + 1 < len(self.ranks):
            outputs.append(state.sent)
            gradients += self.queue.get(Transfer(TransferKind.GRADIENT, self.stage + 1, index))
        torch.autograd.backward(outputs, gradients)
        if self.stage:
            assert state.received.grad is not None
            self.queue.put(Transfer(TransferKind.GRADIENT, self.stage, index), [state.received.grad])

    def _start_transfer(self, transfer: Transfer, to_send: list[Tensor] | None) -> tuple[list[Tensor], list[dist.Work]]:
        """Starts a transfer. See TransferQueue."""
        kind, source = transfer.kind, self.ranks[transfer.stage]
        if kind in NEIGHBOUR_OFFSET:
            if to_send:
                target = self.ranks[transfer.stage + NEIGHBOUR_OFFSET[kind]]
                return [], list(filter(None, [dist.isend(tensor, target, group=self.group) for tensor in to_send]))
            tensors = [self._empty_activation()]
            return tensors, list(filter(None, [dist.irecv(tensor, source, group=self.group) for tensor in tensors]))
        group = self.loss_group
        if kind == TransferKind.HIDDEN:
            tensors = to_send or [self._empty_activation() for _ in self._heads(transfer.stage)]
            works = [dist.broadcast(tensor, source, group=group, async_op=True) for tensor in tensors]
            return [] if to_send else tensors, works
        assert to_send is not None
        if kind == TransferKind.STATISTICS:
            gathered = to_send[0].new_empty(len(self.schedule.loss_stages), *to_send[0].shape)
            return [gathered], [dist.all_gather(list(gathered.unbind()), to_send[0], group=group, async_op=True)]
        works = [dist.reduce(tensor, source, group=group, async_op=True) for tensor in to_send]
        return to_send if self.stage == transfer.stage else [], works

    def _empty_activation(self) -> Tensor:
        shape = *self.batches[0].inputs.shape, self.part.config.dim
        return torch.empty(shape, dtype=DTYPES[self.part.run_config.train.dtype], device=self.part.device)

    def _heads(self, stage: int) -> range:
        return self.partition.stages[stage].heads

    def _targets(self, stage_pass: StagePass) -> list[Tensor]:
        """Returns the targets [N] of each head of the pass."""
        heads = self._heads(stage_pass.head_stage)
        return list(self.batches[stage_pass.micro_batch].targets[heads.start : heads.stop].flatten(1))


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    """Creates a process group whose transfers occupy few multiprocessors. Collective."""
    if dist.get_backend() != "nccl":
        return dist.new_group(ranks)
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = MAX_TRANSFER_CTAS
    return dist.new_group(ranks, pg_options=options)
