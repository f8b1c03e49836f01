"""The 1F1B schedule with losses spread by vocabulary, and its simulation.

    FORWARD     trunk layers, and the stage's heads as layers; the heads' outputs go to all slices
    STATISTICS  a slice's logits for the heads of one stage, and their statistics, which all slices exchange
    GRADIENTS   after that exchange: the slice's gradient, and its part of the gradient dH of the heads' outputs
    BACKWARD    heads and trunk layers, once the next stage's gradient and, for heads, the sum of dH have arrived

Every stage repeats the four kinds of passes in one order, each for the micro-batch whose data have arrived by then. The
gradient for a forward pass arrives up to two rounds later, so stages have more micro-batches in flight than in plain
1F1B.

Source: Yeung et al. 2024, arXiv:2411.05288, section 5.
"""

import collections
import copy
import enum
import itertools
import math
from dataclasses import dataclass


class PassKind(enum.IntEnum):
    """The kinds of passes, described above."""

    FORWARD = 0
    STATISTICS = 1
    GRADIENTS = 2
    BACKWARD = 3


class TransferKind(enum.Enum):
    """The kinds of data that stages transfer.

    In STATISTICS and HIDDEN_GRADIENT all slices exchange data about the losses of one stage's heads.
    """

    ACTIVATIONS = "to the next stage"
    HIDDEN = "from a stage with heads to all slices"
    STATISTICS = "from all slices to all"
    HIDDEN_GRADIENT = "from all slices back to the stage with heads, summed"
    GRADIENT = "to the stage before"


NEIGHBOUR_OFFSET = {TransferKind.ACTIVATIONS: 1, TransferKind.GRADIENT: -1}  # receiving stage - sending stage
PATTERNS = [
    (PassKind.FORWARD, *others)
    for others in itertools.permutations((PassKind.BACKWARD, PassKind.STATISTICS, PassKind.GRADIENTS))
]


@dataclass(frozen=True)
class StageTimes:
    """Times of one micro-batch's passes through one stage.

    Attributes:
        statistics, gradients: for the loss of one head.
        num_heads: heads that are layers of this stage.
    """

    forward: float
    backward: float
    statistics: float
    gradients: float
    num_heads: int

    def total(self, num_heads: int) -> float:
        """Returns the time of all passes, for a model with `num_heads` heads."""
        return self.forward + self.backward + num_heads * (self.statistics + self.gradients)


@dataclass(frozen=True)
class TransferTimes:
    """Times of transfers, during which stages can compute.

    Attributes:
        send_activation: one micro-batch to the next stage, or its gradient to the previous stage.
        broadcast_hidden: one head's hidden states from its stage to all slices, or the sum of their gradients from all
            slices back.
        gather_statistics: one head's statistics from all slices to all slices.
    """

    send_activation: float = 0.0
    broadcast_hidden: float = 0.0
    gather_statistics: float = 0.0


@dataclass(frozen=True)
class StagePass:
    """One pass of one micro-batch through one stage.

    Attributes:
        head_stage: the stage whose heads have the losses of a STATISTICS or GRADIENTS pass; else the same as `stage`.
    """

    stage: int
    kind: PassKind
    head_stage: int
    micro_batch: int


@dataclass(frozen=True)
class Transfer:
    """One transfer for one micro-batch.

    Attributes:
        stage: the stage that sends; where all slices send, the stage whose heads the data belong to.
    """

    kind: TransferKind
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class TimedStagePass:
    """A pass, from time `start` to time `end`."""

    stage_pass: StagePass
    start: float
    end: float


class SpreadSchedule:
    """The order of all stages' passes: a pattern of pass kinds, repeated once per period.

    The period is the time that the slowest stage needs for one micro-batch, plus `slack`. Slack may save whole
    rounds: without it, a gradient that just misses its turn in the previous stage's round waits for the next round.

    Attributes:
        head_stages: the stages that have heads.
        loss_stages: the stages that take part in losses: they have rows of the unembedding, or heads.
        orders: each stage's passes, first to last.
    """

    def __init__(
        self,
        times: list[StageTimes],
        num_micro_batches: int,
        transfer_times: TransferTimes,
        pattern: tuple[PassKind, ...],
        slack: float = 0.0,
    ):
        self.times, self.num_micro_batches, self.transfer_times = times, num_micro_batches, transfer_times
        self.head_stages = [index for index, stage in enumerate(times) if stage.num_heads]
        self.loss_stages = [
            index for index, stage in enumerate(times) if stage.statistics or stage.gradients or stage.num_heads
        ]
        period = self.period + slack
        first_starts = self._first_starts(pattern, period)

        def start(stage_pass: StagePass) -> tuple[float, PassKind, int]:
            """Returns a key that sorts every pass after the passes it depends on, on all stages.

            A dependency starts earlier or, if it takes no time, is of an earlier kind.
            """
            first_start = first_starts[stage_pass.stage, stage_pass.kind, stage_pass.head_stage]
            return first_start + stage_pass.micro_batch * period, stage_pass.kind, stage_pass.micro_batch

        self.orders = []
        for stage in range(len(times)):
            slots = itertools.product(self._slots(stage, pattern), range(num_micro_batches))
            self.orders.append(sorted((StagePass(stage, *slot, micro_batch) for slot, micro_batch in slots), key=start))

    @property
    def period(self) -> float:
        """The time of one micro-batch on the slowest stage."""
        num_heads = sum(stage.num_heads for stage in self.times)
        return max(stage.total(num_heads) for stage in self.times)

    def with_times(self, times: list[StageTimes], transfer_times: TransferTimes) -> "SpreadSchedule":
        """Returns a schedule with the same orders and other times."""
        other = copy.copy(self)
        other.times, other.transfer_times = times, transfer_times
        return other

    def max_in_flight(self, stage: int) -> int:
        """Returns the largest number of micro-batches that the stage has in flight.

        A micro-batch is in flight between its forward and its backward pass.
        """
        changes = [
            {PassKind.FORWARD: 1, PassKind.BACKWARD: -1}.get(stage_pass.kind, 0) for stage_pass in self.orders[stage]
        ]
        return max(itertools.accumulate(changes))

    def simulate(self) -> list[TimedStagePass]:
        """Returns all passes with their times: each starts when its stage is free and its data have arrived."""
        ends: dict[StagePass, float] = {}
        timed_passes: list[TimedStagePass] = []
        free_at, next_index = [0.0] * len(self.times), [0] * len(self.times)
        total = sum(map(len, self.orders))
        while len(timed_passes) < total:
            for stage, order in enumerate(self.orders):
                while (
                    next_index[stage] < len(order)
                    and (arrival := self._arrival_time(order[next_index[stage]], ends)) is not None
                ):
                    stage_pass = order[next_index[stage]]
                    start = max(free_at[stage], arrival)
                    duration = self._duration(stage_pass.stage, stage_pass.kind, stage_pass.head_stage)
                    free_at[stage] = ends[stage_pass] = start + duration
                    timed_passes.append(TimedStagePass(stage_pass, start, free_at[stage]))
                    next_index[stage] += 1
        return timed_passes

    def transfers(self) -> list[Transfer]:
        """Returns all transfers of a step, in the order in which the simulation makes their data available.

        Every rank must start its transfers in this order, and run its passes in the order of `orders`. Then no pass
        waits for a transfer that cannot start: earlier transfers in this order send data of passes that end earlier.
        """
        timed_passes, transfers = self.simulate(), []
        num_ready: collections.Counter[tuple[TransferKind, int, int]] = collections.Counter()
        for index in sorted(range(len(timed_passes)), key=lambda index: (timed_passes[index].end, index)):
            stage_pass = timed_passes[index].stage_pass
            kinds: list[TransferKind] = []
            if stage_pass.kind == PassKind.FORWARD:
                kinds += [TransferKind.ACTIVATIONS] if stage_pass.stage + 1 < len(self.times) else []
                kinds += [TransferKind.HIDDEN] if stage_pass.stage in self.head_stages else []
            elif stage_pass.kind == PassKind.BACKWARD:
                kinds += [TransferKind.GRADIENT] if stage_pass.stage else []
            else:
                is_statistics = stage_pass.kind == PassKind.STATISTICS
                kind = TransferKind.STATISTICS if is_statistics else TransferKind.HIDDEN_GRADIENT
                num_ready[kind, stage_pass.head_stage, stage_pass.micro_batch] += 1
                all_ready = num_ready[kind, stage_pass.head_stage, stage_pass.micro_batch] == len(self.loss_stages)
                kinds += [kind] if all_ready else []
            transfers += [Transfer(kind, stage_pass.head_stage, stage_pass.micro_batch) for kind in kinds]
        return transfers

    def takes_part(self, stage: int, transfer: Transfer) -> bool:
        """Returns whether the stage sends or receives in the transfer."""
        if transfer.kind in NEIGHBOUR_OFFSET:
            return stage in (transfer.stage, transfer.stage + NEIGHBOUR_OFFSET[transfer.kind])
        return stage in self.loss_stages

    def sends(self, stage: int, transfer: Transfer) -> bool:
        """Returns whether a stage that takes part sends data, which a pass of that stage computes first."""
        return stage == transfer.stage or transfer.kind in (TransferKind.STATISTICS, TransferKind.HIDDEN_GRADIENT)

    def _slots(self, stage: int, pattern: tuple[PassKind, ...]) -> list[tuple[PassKind, int]]:
        """Returns (kind, head stage) of a stage's passes for each micro-batch, in the pattern's order."""
        slots: list[tuple[PassKind, int]] = []
        for kind in pattern:
            if kind in (PassKind.FORWARD, PassKind.BACKWARD):
                slots.append((kind, stage))
            elif stage in self.loss_stages:
                slots += [(kind, head_stage) for head_stage in self.head_stages]
        return slots

    def _first_starts(self, pattern: tuple[PassKind, ...], period: float) -> dict[tuple[int, PassKind, int], float]:
        """Returns when each (stage, kind, head stage) starts for micro-batch 0 in the steady state.

        In the steady state each stage repeats the pattern once per period, without end. A stage's round begins with its
        forward pass; every other pass runs in the first round in which its data have arrived
        before its slot.
        """
        starts: dict[StagePass, float] = {}
        slot_starts: list[dict[tuple[PassKind, int], float]] = [{} for _ in self.times]
        round_start = 0.0
        for stage in range(len(self.times)):
            slot_start = round_start
            for kind, head_stage in self._slots(stage, pattern):
                slot_starts[stage][kind, head_stage] = slot_start
                slot_start += self._duration(stage, kind, head_stage)
            starts[StagePass(stage, PassKind.FORWARD, stage, 0)] = round_start
            round_start += self.times[stage].forward + self.transfer_times.send_activation
        ends = {
            stage_pass: start + self._duration(stage_pass.stage, stage_pass.kind, stage_pass.head_stage)
            for stage_pass, start in starts.items()
        }
        losses = itertools.product((PassKind.STATISTICS, PassKind.GRADIENTS), self.head_stages, self.loss_stages)
        sequence = [StagePass(stage, kind, head_stage, 0) for kind, head_stage, stage in losses]
        sequence += [StagePass(stage, PassKind.BACKWARD, stage, 0) for stage in reversed(range(len(self.times)))]
        for stage_pass in sequence:
            slot_start = slot_starts[stage_pass.stage][stage_pass.kind, stage_pass.head_stage]
            arrival = self._arrival_time(stage_pass, ends)
            assert arrival is not None
            num_rounds = math.ceil((arrival - slot_start) / period - 1e-9)
            starts[stage_pass] = max(arrival, slot_start + period * max(0, num_rounds))
            ends[stage_pass] = starts[stage_pass] + self._duration(
                stage_pass.stage, stage_pass.kind, stage_pass.head_stage
            )
        return {
            (stage_pass.stage, stage_pass.kind, stage_pass.head_stage): start for stage_pass, start in starts.items()
        }

    def _duration(self, stage: int, kind: PassKind, head_stage: int) -> float:
        times = self.times[stage]
        if kind in (PassKind.FORWARD, PassKind.BACKWARD):
            return times.forward if kind == PassKind.FORWARD else times.backward
        return self.times[head_stage].num_heads * (times.statistics if kind == PassKind.STATISTICS else times.gradients)

    def _arrival_time(self, stage_pass: StagePass, ends: dict[StagePass, float]) -> float | None:
        """Returns when all data of a pass have arrived, or None if a pass it depends on is not in `ends` yet."""
        dependencies = self._dependencies(stage_pass)
        if any(dependency not in ends for dependency, _ in dependencies):
            return None
        return max((ends[dependency] + delay for dependency, delay in dependencies), default=0.0)

    def _dependencies(self, stage_pass: StagePass) -> list[tuple[StagePass, float]]:
        """Returns the passes whose results a pass needs, and the transfer time of each result."""
        transfer_times, stage, micro_batch = self.transfer_times, stage_pass.stage, stage_pass.micro_batch
        head_stage, num_heads = stage_pass.head_stage, self.times[stage_pass.head_stage].num_heads
        if stage_pass.kind == PassKind.FORWARD:
            if not stage:
                return []
            return [(StagePass(stage - 1, PassKind.FORWARD, stage - 1, micro_batch), transfer_times.send_activation)]
        if stage_pass.kind == PassKind.STATISTICS:
            delay = 0.0 if stage == head_stage else num_heads * transfer_times.broadcast_hidden
            return [(StagePass(head_stage, PassKind.FORWARD, head_stage, micro_batch), delay)]
        if stage_pass.kind == PassKind.GRADIENTS:
            delay = num_heads * transfer_times.gather_statistics
            return [
                (StagePass(index, PassKind.STATISTICS, head_stage, micro_batch), delay) for index in self.loss_stages
            ]
        dependencies = [(StagePass(stage, PassKind.FORWARD, stage, micro_batch), 0.0)]
        if stage + 1 < len(self.times):
            next_backward = StagePass(stage + 1, PassKind.BACKWARD, stage + 1, micro_batch)
            dependencies.append((next_backward, transfer_times.send_activation))
        if num_heads:
            delay = num_heads * transfer_times.broadcast_hidden
            dependencies += [
                (StagePass(index, PassKind.GRADIENTS, stage, micro_batch), delay) for index in self.loss_stages
            ]
        return dependencies


def fastest_schedule(times: list[StageTimes], num_micro_batches: int, transfer_times: TransferTimes) -> SpreadSchedule:
    """Returns the schedule with the shortest step, over all patterns and a few values of slack.

    Candidates are compared with few micro-batches: further ones only repeat the middle of the step.
    """
    few = min(num_micro_batches, 4 * len(times))

    def step_time(pattern: tuple[PassKind, ...], slack: float) -> float:
        schedule = SpreadSchedule(times, few, transfer_times, pattern, slack)
        return max(timed_pass.end for timed_pass in schedule.simulate())

    send_time = transfer_times.send_activation
    slacks = [count * send_time for count in (range(0, 5, 2) if send_time else (0,))]
    pattern, slack = min(itertools.product(PATTERNS, slacks), key=lambda candidate: step_time(*candidate))
    return SpreadSchedule(times, num_micro_batches, transfer_times, pattern, slack)
