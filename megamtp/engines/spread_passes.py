"""What a stage does in each pass of the schedule with spread losses, and what it exchanges with the others.

All transfers run beside the computation: a pass waits only for what it needs. All ranks begin theirs in one order, the
schedule's, and on a GPU in one stream, each after the one before: NCCL may stop for ever where ranks begin transfers in
different orders, in different groups and streams too (https://github.com/NVIDIA/nccl/issues/783), and a transfer that
waits for its peers keeps some multiprocessors from computing.

Tests: tests/distributed/test_spread_pipeline.py.
"""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES
from megamtp.engines.stage import StagePart
from megamtp.losses.float8 import Float8Products, Float8Weight
from megamtp.losses.linear_cross_entropy import accumulation_dtype
from megamtp.losses.vocabulary_slice import combine_statistics
from megamtp.planning.spread import SpreadPartition
from megamtp.planning.spread_schedule import NEIGHBOUR, Carries, Kind, Pass, Transfer

BACKWARD = (Carries.HIDDEN_GRADIENT, Carries.GRADIENT)  # not in an evaluation
AHEAD = 8  # passes
MULTIPROCESSORS = 4  # that a transfer may hold while it waits for its peers and lasts; NCCL would take 16 and more


@dataclass
class SharedLosses:
    """The losses of one host's heads of one micro-batch in one slice.

    Attributes:
        hidden: [N, D] of each head; logits: [N, R] of each, none without rows.
        products: of each, where they are in fp8; none without rows.
    """

    hidden: list[Tensor]
    logits: list[Tensor]
    products: list[Float8Products | None]


@dataclass
class MicroBatch:
    """What a stage keeps of one between its passes.

    Attributes:
        received: what its layers work on, a leaf; sent, normed: what they returned, for other stages and for the
            slices.
        losses: by host.
        d_weight: of this stage's rows, in fp32, from `open_hosts` fewer hosts than there are.
    """

    received: Tensor
    sent: Tensor
    normed: list[Tensor]
    open_hosts: int
    losses: dict[int, SharedLosses] = field(default_factory=dict)
    d_weight: Tensor | None = None


class Traffic:
    """This rank's part in a step's transfers, begun in their order from the first pass on, when this stage has made
    what it gives.

    Args:
        lane: the stream of all transfers, on a GPU.
        order: of the transfers in which it takes part; gives: in which of these it makes something first.
        begin: starts one with what this stage gives (None if nothing): (what it brings this stage, works to wait for).
    """

    def __init__(
        self,
        lane: torch.cuda.Stream | None,
        order: list[Transfer],
        gives: Callable[[Transfer], bool],
        begin: Callable[[Transfer, list[Tensor] | None], tuple[list[Tensor], list[dist.Work]]],
    ):
        self.lane, self.order, self.gives, self._begin = lane, order, gives, begin
        self.given: dict[Transfer, tuple[list[Tensor], torch.cuda.Event | None]] = {}
        self.begun: dict[Transfer, tuple[list[Tensor], list[dist.Work], torch.cuda.Event | None]] = {}
        self.kept: list[tuple[list[Tensor], list[dist.Work]]] = []  # given, and under way
        self.place = 0

    def give(self, transfer: Transfer, tensors: list[Tensor]) -> None:
        """What the current stream has just made."""
        self.given[transfer] = tensors, torch.cuda.current_stream().record_event() if self.lane else None
        self._begin_all()

    def take(self, transfer: Transfer) -> list[Tensor]:
        """What a transfer brings, for the current stream. Raises KeyError: it comes before something not yet given."""
        self._begin_all()
        tensors, works, end = self.begun.pop(transfer)
        if end:
            torch.cuda.current_stream().wait_event(end)
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream())
        else:
            _wait(works)
        return tensors

    def finish(self) -> None:
        """Until everything has left."""
        if self.lane:
            torch.cuda.current_stream().wait_stream(self.lane)
        else:
            for _, works in self.kept:
                _wait(works)
        self.kept.clear()

    def _begin_all(self) -> None:
        if self.lane and self.place == 0:
            self.lane.wait_stream(torch.cuda.current_stream())  # what ranks have exchanged before comes first
        while self.place < len(self.order):
            transfer = self.order[self.place]
            if self.gives(transfer) and transfer not in self.given:
                return
            self.place += 1
            tensors, made = self.given.pop(transfer, (None, None))
            with torch.cuda.stream(self.lane) if self.lane else nullcontext():
                if made and self.lane:
                    self.lane.wait_event(made)
                brought, works = self._begin(transfer, tensors)
                if self.lane:
                    _wait(works)  # the lane does, not this thread
                if brought:
                    self.begun[transfer] = brought, works, self.lane.record_event() if self.lane else None
            self.kept = [(given, works) for given, works in self.kept if not all(work.is_completed() for work in works)]
            if tensors:
                self.kept.append((tensors, works))


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class SpreadPasses:
    """The passes of one stage. Collective: all ranks make theirs together, and run them in the orders of one schedule.

    Args:
        ranks: of all stages, by pipeline; own_pipeline: which of these is this stage's.
        seed: the gradient with which the backward pass of a micro-batch's loss starts.
    """

    def __init__(
        self,
        part: StagePart,
        cut: SpreadPartition,
        ranks: list[list[int]],
        own_pipeline: int,
        seed: Callable[[], float],
    ):
        self.part, self.cut, self.ranks, self.seed = part, cut, ranks[own_pipeline], seed
        self.stage, self.hosts, self.slices = cut.stages.index(part.own), cut.schedule.hosts, cut.schedule.slices
        self.lane = torch.cuda.Stream() if part.device.type == "cuda" else None
        for pipeline, of_stages in enumerate(ranks):
            everyone, slices = _new_group(of_stages), _new_group([of_stages[stage] for stage in self.slices])
            if pipeline == own_pipeline:
                self.group, self.slices_group = everyone, slices

    def begin(self, batches: list[Batch], loss_scales: list[float], transfers: list[Transfer], learning: bool) -> None:
        """Before a step or, without `learning`, an evaluation: its micro-batches, on the device, and each head's
        loss's factor.
        """
        self.batches, self.loss_scales, self.learning = batches, loss_scales, learning
        self.micro_batches: dict[int, MicroBatch] = {}
        self.float8_weight = Float8Weight()  # weights do not change within a step
        self.ends: deque[torch.cuda.Event] = deque()  # of passes that the card may not have done yet
        schedule, stage = self.cut.schedule, self.stage
        order = [
            each
            for each in transfers
            if schedule.takes_part(stage, each) and (learning or each.carries not in BACKWARD)
        ]
        self.traffic = Traffic(self.lane, order, lambda each: schedule.gives(stage, each), self._transfer)

    def run(self, work: Pass) -> None:
        """One pass; those of a step in the schedule's order.

        On a GPU, Python goes ahead of the card only so far: what it asks for early must be kept until the card comes to
        it.
        """
        if self.lane and len(self.ends) == AHEAD:
            self.ends.popleft().synchronize()
        if work.kind == Kind.FORWARD:
            self._forward(work.micro_batch)
        elif work.kind == Kind.STATISTICS:
            self._statistics(self.micro_batches[work.micro_batch], work)
        elif work.kind == Kind.GRADIENTS:
            self._gradients(self.micro_batches[work.micro_batch], work)
        else:
            self._backward(self.micro_batches.pop(work.micro_batch), work.micro_batch)
        if self.lane:
            self.ends.append(torch.cuda.current_stream().record_event())

    def finish(self) -> None:
        """After the last pass: waits until everything has left."""
        self.traffic.finish()
        self.micro_batches.clear()

    def _forward(self, index: int) -> None:
        batch = self.batches[index]
        received = batch.inputs
        if self.stage:
            received = self.traffic.take(Transfer(Carries.ACTIVATIONS, self.stage - 1, index))[0].requires_grad_(
                self.learning
            )
        sent, normed = self.part.run_layers(received, batch)
        if self.learning or self.stage in self.slices:
            self.micro_batches[index] = MicroBatch(received, sent, normed, len(self.hosts))
        if self.stage + 1 < len(self.ranks):
            self.traffic.give(Transfer(Carries.ACTIVATIONS, self.stage, index), [sent.detach()])
        if normed:
            self.traffic.give(Transfer(Carries.HIDDEN, self.stage, index), [hidden.detach() for hidden in normed])

    @torch.no_grad()
    def _statistics(self, own: MicroBatch, work: Pass) -> None:
        hidden = own.normed
        if work.host != self.stage:
            hidden = self.traffic.take(Transfer(Carries.HIDDEN, work.host, work.micro_batch))
        hidden, logits, found = [each.detach().flatten(0, -2) for each in hidden], [], []
        products: list[Float8Products | None] = []
        for head, each, targets_N in zip(self._heads(work.host), hidden, self._targets(work), strict=True):
            if self.part.extent.rows:
                if self.learning:  # evaluations stay in the model's dtype, so that they compare
                    own_products = self.part.slice_products(head, each, self.float8_weight, self._factor(head))
                else:
                    own_products = None
                logits_NR, statistics_3N = self.part.slice_statistics(each, targets_N, own_products)
                logits.append(logits_NR)
                products.append(own_products)
            else:
                statistics_3N = torch.zeros(3, len(each), dtype=accumulation_dtype(each.dtype), device=each.device)
                statistics_3N[0] = -torch.inf
            found.append(statistics_3N)
        self.traffic.give(Transfer(Carries.STATISTICS, work.host, work.micro_batch), [torch.stack(found)])
        own.losses[work.host] = SharedLosses(hidden, logits, products)

    def _factor(self, head: int) -> float:
        """Of the gradient with respect to a head's logits."""
        return self.loss_scales[head] * self.seed()

    @torch.no_grad()
    def _gradients(self, own: MicroBatch, work: Pass) -> None:
        losses, d_hidden = own.losses.pop(work.host), []
        (statistics,) = self.traffic.take(Transfer(Carries.STATISTICS, work.host, work.micro_batch))
        for place, (head, targets_N) in enumerate(zip(self._heads(work.host), self._targets(work), strict=True)):
            nll_N, log_partition_N = combine_statistics(statistics[:, place], targets_N)
            if work.host == self.stage:
                self.part.nll_sums[head] += nll_N.sum()
            if self.learning:
                d_hidden.append(self._slice_gradients(own, losses, place, head, targets_N, log_partition_N))
        if self.learning:
            self.traffic.give(Transfer(Carries.HIDDEN_GRADIENT, work.host, work.micro_batch), d_hidden)
        own.open_hosts -= 1
        if self.learning and own.open_hosts == 0 and own.d_weight is not None:
            weight, gradient = self.part.unembedding_weight, own.d_weight
            own.d_weight = None
            with torch.enable_grad():  # through autograd, so that the engine's optimizer sees it as any other
                torch.autograd.backward(weight.view_as(weight), gradient.to(weight.dtype))
        if not self.learning and own.open_hosts == 0:
            self.micro_batches.pop(work.micro_batch)

    def _slice_gradients(
        self, own: MicroBatch, losses: SharedLosses, place: int, head: int, targets_N: Tensor, log_partition_N: Tensor
    ) -> Tensor:
        hidden_ND = losses.hidden[place]
        if not self.part.extent.rows:
            return torch.zeros_like(hidden_ND)
        if own.d_weight is None:
            weight = self.part.unembedding_weight
            own.d_weight = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))
        return self.part.slice_gradients(
            losses.logits[place],
            hidden_ND,
            targets_N,
            log_partition_N,
            own.d_weight,
            self._factor(head),
            losses.products[place],
        )

    def _backward(self, own: MicroBatch, index: int) -> None:
        outputs, gradients = list(own.normed), []
        if outputs:
            d_hidden = self.traffic.take(Transfer(Carries.HIDDEN_GRADIENT, self.stage, index))
            gradients += [gradient.view_as(output) for gradient, output in zip(d_hidden, outputs, strict=True)]
        if self.stage + 1 < len(self.ranks):
            outputs.append(own.sent)
            gradients += self.traffic.take(Transfer(Carries.GRADIENT, self.stage + 1, index))
        torch.autograd.backward(outputs, gradients)
        if self.stage:
            assert own.received.grad is not None
            self.traffic.give(Transfer(Carries.GRADIENT, self.stage, index), [own.received.grad])

    def _transfer(self, transfer: Transfer, given: list[Tensor] | None) -> tuple[list[Tensor], list[dist.Work]]:
        """See Traffic."""
        carries, source = transfer.carries, self.ranks[transfer.stage]
        if carries in NEIGHBOUR:
            if given:
                peer = self.ranks[transfer.stage + NEIGHBOUR[carries]]
                return [], list(filter(None, [dist.isend(tensor, peer, group=self.group) for tensor in given]))
            tensors = [self._boundary()]
            return tensors, list(filter(None, [dist.irecv(tensor, source, group=self.group) for tensor in tensors]))
        group = self.slices_group
        if carries == Carries.HIDDEN:
            tensors = given or [self._boundary() for _ in self._heads(transfer.stage)]
            works = [dist.broadcast(tensor, source, group=group, async_op=True) for tensor in tensors]
            return [] if given else tensors, works
        assert given is not None
        if carries == Carries.STATISTICS:
            gathered = given[0].new_empty(len(self.slices), *given[0].shape)
            return [gathered], [dist.all_gather(list(gathered.unbind()), given[0], group=group, async_op=True)]
        works = [dist.reduce(tensor, source, group=group, async_op=True) for tensor in given]
        return given if self.stage == transfer.stage else [], works

    def _boundary(self) -> Tensor:
        shape = *self.batches[0].inputs.shape, self.part.config.dim
        return torch.empty(shape, dtype=DTYPES[self.part.run_config.train.precision], device=self.part.device)

    def _heads(self, host: int) -> range:
        return self.cut.stages[host].heads

    def _targets(self, work: Pass) -> list[Tensor]:
        """[N] of each of the host's heads."""
        heads = self._heads(work.host)
        return list(self.batches[work.micro_batch].targets[heads.start : heads.stop].flatten(1))


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    """Collective."""
    if dist.get_backend() != "nccl":
        return dist.new_group(ranks)
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = MULTIPROCESSORS
    return dist.new_group(ranks, pg_options=options)
