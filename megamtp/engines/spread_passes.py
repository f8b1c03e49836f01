"""What a stage does in each pass of the schedule with spread losses, and what it exchanges with the others.

All transfers run beside the computation: a pass waits only for what it needs. Activations and gradients between neighbours, hidden
states, statistics and their gradients have process groups of their own, and the last three one for each stage with heads, because
stages may take their passes of different kinds in different orders, but in one group all must ask for the same thing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.data.loader import Batch
from megamtp.engines.base import DTYPES
from megamtp.engines.spread_schedule import Kind, Pass
from megamtp.engines.spread_stage import SpreadStage
from megamtp.losses.linear_cross_entropy import wide
from megamtp.losses.vocabulary_slice import combine, slice_gradients, slice_statistics


@dataclass
class SharedLosses:
    """The losses of one host's heads of one micro-batch in one slice.

    Attributes:
        hidden: [N, D] of each head; logits: [N, R] of each, none without rows.
        statistics: of all slices, [S, heads, 3, N], once `arrival` has come.
    """

    hidden: list[Tensor]
    logits: list[Tensor]
    statistics: Tensor
    arrival: dist.Work


@dataclass
class MicroBatch:
    """What a stage keeps of one between its passes.

    Attributes:
        received: what its layers work on, a leaf; sent, normed: what they returned, for other stages and for the slices.
        losses: by host. d_normed: the gradients of `normed`, once `arrivals` have come.
        d_weight: of this stage's rows, in fp32, from `open_hosts` fewer hosts than there are.
    """

    received: Tensor
    sent: Tensor
    normed: list[Tensor]
    open_hosts: int
    losses: dict[int, SharedLosses] = field(default_factory=dict)
    d_normed: list[Tensor] = field(default_factory=list)
    arrivals: list[dist.Work] = field(default_factory=list)
    d_weight: Tensor | None = None


class Incoming:
    """What another stage sends of every micro-batch, asked for one micro-batch ahead of its use.

    Args:
        ask: begins a receipt: (what is to be filled, works to wait for).
    """

    def __init__(self, ask: Callable[[], tuple[list[Tensor], list[dist.Work]]], count: int):
        self.ask, self.left, self.waiting = ask, count, []

    def take(self) -> list[Tensor]:
        """The next one."""
        while self.left and len(self.waiting) < 2:
            self.waiting.append(self.ask())
            self.left -= 1
        tensors, works = self.waiting.pop(0)
        for work in works:
            work.wait()
        return tensors


class SpreadPasses:
    """The passes of one stage. Collective: all ranks make theirs together, and run them in the orders of one schedule.

    Args:
        ranks: of all stages, by pipeline; own_pipeline: which of these is this stage's.
        seed: the gradient with which the backward pass of a micro-batch's loss starts.
    """

    def __init__(self, model: SpreadStage, ranks: list[list[int]], own_pipeline: int, seed: Callable[[], float]):
        self.model, self.ranks, self.seed = model, ranks[own_pipeline], seed
        schedule = model.cut.schedule
        self.slices, self.hosts = schedule.slices, schedule.hosts
        self.stage = model.stage_id
        kinds = [
            "activations",
            "gradients",
            *((kind, host) for kind in ("hidden", "statistics", "d_hidden") for host in self.hosts),
        ]
        self.groups = {}
        for pipeline, all_ranks in enumerate(ranks):
            for kind in kinds:
                members = all_ranks if isinstance(kind, str) else [all_ranks[stage] for stage in self.slices]
                group = dist.new_group(members)
                if pipeline == own_pipeline:
                    self.groups[kind] = group
        self._open_groups()

    def _open_groups(self) -> None:
        """Uses every group once, in one order on all ranks. Collective.

        NCCL makes a communicator at a group's first use, in which a rank's host waits for the others'; at first use in the passes'
        orders, which differ, they would wait for each other in different groups, for ever.
        """
        token, last = torch.zeros(1, device=self.model.device), len(self.ranks) - 1
        for kind, group in self.groups.items():
            if not isinstance(kind, str):
                if self.stage in self.slices:
                    dist.all_reduce(token, group=group)
                continue
            if self.stage > 0:
                dist.recv(token, self.ranks[self.stage - 1], group=group)
            if self.stage < last:
                dist.send(token, self.ranks[self.stage + 1], group=group)

    def begin(self, batches: list[Batch], loss_scales: list[float], learning: bool) -> None:
        """Before a step or, without `learning`, an evaluation: its micro-batches, on the device, and each head's loss's factor."""
        self.batches, self.loss_scales, self.learning = batches, loss_scales, learning
        self.micro_batches: dict[int, MicroBatch] = {}
        self.sending: list[tuple[Tensor, dist.Work]] = []
        count = len(batches)
        self.activations = Incoming(lambda: self._ask_neighbour(self.stage - 1, "activations"), count)
        self.gradients = Incoming(lambda: self._ask_neighbour(self.stage + 1, "gradients"), count)
        self.hidden = {host: Incoming(lambda host=host: self._ask_hidden(host), count) for host in self.hosts if host != self.stage}

    def run(self, work: Pass) -> None:
        """One pass; those of a step in the schedule's order."""
        if work.kind == Kind.FORWARD:
            self._forward(work.micro_batch)
        elif work.kind == Kind.STATISTICS:
            self._statistics(self.micro_batches[work.micro_batch], work)
        elif work.kind == Kind.GRADIENTS:
            self._gradients(self.micro_batches[work.micro_batch], work)
        else:
            self._backward(self.micro_batches.pop(work.micro_batch))

    def finish(self) -> None:
        """After the last pass: waits until everything has left."""
        for _, work in self.sending:
            work.wait()
        self.sending.clear()
        self.micro_batches.clear()

    def _forward(self, index: int) -> None:
        batch = self.batches[index]
        received = self.activations.take()[0].requires_grad_(self.learning) if self.stage else batch.inputs
        sent, normed = self.model.run_layers(received, batch)
        if self.learning or self.stage in self.slices:
            self.micro_batches[index] = MicroBatch(received, sent, normed, len(self.hosts))
        if self.stage + 1 < len(self.ranks):
            self._send(sent.detach(), self.stage + 1, "activations")
        for hidden in normed:
            tensor, group = hidden.detach(), self.groups["hidden", self.stage]
            self.sending.append((tensor, dist.broadcast(tensor, self.ranks[self.stage], group=group, async_op=True)))

    @torch.no_grad()
    def _statistics(self, own: MicroBatch, work: Pass) -> None:
        hidden = own.normed if work.host == self.stage else self.hidden[work.host].take()
        hidden, logits, found = [each.detach().flatten(0, -2) for each in hidden], [], []
        for each, targets_N in zip(hidden, self._targets(work), strict=True):
            if self.model.own.contents.rows:
                logits_NR, statistics_3N = slice_statistics(each, self.model.unembedding.weight, targets_N, self.model.first_row)
                logits.append(logits_NR)
            else:
                statistics_3N = torch.zeros(3, len(each), dtype=wide(each.dtype), device=each.device)
                statistics_3N[0] = -torch.inf
            found.append(statistics_3N)
        own_statistics = torch.stack(found)
        gathered = own_statistics.new_empty(len(self.slices), *own_statistics.shape)
        group = self.groups["statistics", work.host]
        arrival = dist.all_gather(list(gathered.unbind()), own_statistics, group=group, async_op=True)
        self.sending.append((own_statistics, arrival))
        own.losses[work.host] = SharedLosses(hidden, logits, gathered, arrival)

    @torch.no_grad()
    def _gradients(self, own: MicroBatch, work: Pass) -> None:
        losses = own.losses.pop(work.host)
        losses.arrival.wait()
        for place, (head, targets_N) in enumerate(zip(self._heads(work.host), self._targets(work), strict=True)):
            nll_N, log_partition_N = combine(losses.statistics[:, place], targets_N)
            if work.host == self.stage:
                self.model.nll_sums[head] += nll_N.sum()
            if self.learning:
                d_hidden = self._slice_gradients(own, losses, place, head, targets_N, log_partition_N)
                self._sum_at_host(own, d_hidden, work.host)
        own.open_hosts -= 1
        if self.learning and own.open_hosts == 0 and own.d_weight is not None:
            weight, gradient = self.model.unembedding.weight, own.d_weight
            own.d_weight = None
            with torch.enable_grad():  # through autograd, so that the engine's optimizer sees it as any other
                torch.autograd.backward(weight.view_as(weight), gradient.to(weight.dtype))
        if not self.learning and own.open_hosts == 0:
            self.micro_batches.pop(work.micro_batch)

    def _slice_gradients(
        self, own: MicroBatch, losses: SharedLosses, place: int, head: int, targets_N: Tensor, log_partition_N: Tensor
    ) -> Tensor:
        hidden_ND, weight = losses.hidden[place], self.model.unembedding.weight
        if weight is None:
            return torch.zeros_like(hidden_ND)
        if own.d_weight is None:
            own.d_weight = torch.zeros_like(weight, dtype=wide(weight.dtype))
        return slice_gradients(
            losses.logits[place], hidden_ND, weight, targets_N, self.model.first_row, log_partition_N, own.d_weight,
            self.loss_scales[head] * self.seed(), self.model.config.head_loss.z_loss,
        )  # fmt: skip

    def _sum_at_host(self, own: MicroBatch, d_hidden_ND: Tensor, host: int) -> None:
        work = dist.reduce(d_hidden_ND, self.ranks[host], group=self.groups["d_hidden", host], async_op=True)
        if host == self.stage:
            own.d_normed.append(d_hidden_ND)
            own.arrivals.append(work)
        else:
            self.sending.append((d_hidden_ND, work))

    def _backward(self, own: MicroBatch) -> None:
        for work in own.arrivals:
            work.wait()
        outputs = list(own.normed)
        gradients = [gradient.view_as(output) for gradient, output in zip(own.d_normed, outputs, strict=True)]
        if self.stage + 1 < len(self.ranks):
            outputs.append(own.sent)
            gradients += self.gradients.take()
        torch.autograd.backward(outputs, gradients)
        if self.stage:
            self._send(own.received.grad, self.stage - 1, "gradients")

    def _send(self, tensor: Tensor, stage: int, group: str) -> None:
        self.sending = [(kept, work) for kept, work in self.sending if not work.is_completed()]
        self.sending.append((tensor, dist.isend(tensor, self.ranks[stage], group=self.groups[group])))

    def _ask_neighbour(self, stage: int, group: str) -> tuple[list[Tensor], list[dist.Work]]:
        tensor = self._boundary()
        return [tensor], [dist.irecv(tensor, self.ranks[stage], group=self.groups[group])]

    def _ask_hidden(self, host: int) -> tuple[list[Tensor], list[dist.Work]]:
        tensors = [self._boundary() for _ in self._heads(host)]
        group = self.groups["hidden", host]
        return tensors, [dist.broadcast(tensor, self.ranks[host], group=group, async_op=True) for tensor in tensors]

    def _boundary(self) -> Tensor:
        config = self.model.config
        shape = *self.batches[0].inputs.shape, config.model.dim
        return torch.empty(shape, dtype=DTYPES[config.train.precision], device=self.model.device)

    def _heads(self, host: int) -> range:
        return self.model.cut.stages[host].heads

    def _targets(self, work: Pass) -> list[Tensor]:
        """[N] of each of the host's heads."""
        heads = self._heads(work.host)
        return list(self.batches[work.micro_batch].targets[heads.start : heads.stop].flatten(1))
