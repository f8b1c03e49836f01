"""1F1B with losses spread by vocabulary, played.

    FORWARD     trunk layers, and the layers of the stage's heads; what those return goes to all slices
    STATISTICS  a slice's logits of one stage's heads, and what the slices exchange about them
    GRADIENTS   the same, with the exchange done: the slice's gradient, and its part of dH
    BACKWARD    once the next stage's gradient is here and, in a stage with heads, the sum of dH: heads and trunk layers

Every stage repeats the four in one order, each for the micro-batch whose data are there by then. The answer to a
forward pass comes up to two rounds later, for which stages hold more micro-batches than in plain 1F1B.

Source: Yeung et al. 2024, arXiv:2411.05288, section 5.
"""

import collections
import copy
import enum
import itertools
import math
from dataclasses import dataclass


class Kind(enum.IntEnum):
    """Of a pass."""

    FORWARD = 0
    STATISTICS = 1
    GRADIENTS = 2
    BACKWARD = 3


class Carries(enum.Enum):
    """What a transfer does: STATISTICS and HIDDEN_GRADIENT are exchanges of all slices about the losses of one
    stage's heads.
    """

    ACTIVATIONS = "to the next stage"
    HIDDEN = "from a stage with heads to all slices"
    STATISTICS = "from all slices to all"
    HIDDEN_GRADIENT = "from all slices back to the stage with heads, summed"
    GRADIENT = "to the stage before"


NEIGHBOUR = {Carries.ACTIVATIONS: 1, Carries.GRADIENT: -1}  # from a transfer's stage to the one that it goes to
PATTERNS = [
    (Kind.FORWARD, *others) for others in itertools.permutations((Kind.BACKWARD, Kind.STATISTICS, Kind.GRADIENTS))
]


@dataclass(frozen=True)
class StageTimes:
    """Of one micro-batch in one stage; `statistics` and `gradients` of one head's loss. `num_heads`: heads with
    layers here.
    """

    forward: float
    backward: float
    statistics: float
    gradients: float
    num_heads: int

    def total(self, num_heads: int) -> float:
        """All its passes, of a model with so many heads."""
        return self.forward + self.backward + num_heads * (self.statistics + self.gradients)


@dataclass(frozen=True)
class Exchange:
    """Times of transfers, during which stages may work.

    Attributes:
        hand: one micro-batch to the next stage, or its gradient back.
        hidden: one head's hidden states from its stage to all slices, or their gradients from all slices back, summed.
        statistics: of one head, from all slices to all slices.
    """

    hand: float = 0.0
    hidden: float = 0.0
    statistics: float = 0.0


@dataclass(frozen=True)
class Pass:
    """Of one micro-batch through one stage; in STATISTICS and GRADIENTS for the heads of stage `host`, else host is
    the stage.
    """

    stage: int
    kind: Kind
    host: int
    micro_batch: int


@dataclass(frozen=True)
class Transfer:
    """Of one micro-batch; `stage` gives the data or, where all slices do, has the heads that they are about."""

    carries: Carries
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class SpreadWork:
    """A pass, from `start` to `end`."""

    work: Pass
    start: float
    end: float


class SpreadSchedule:
    """The passes of all stages of `times`, in the order of a pattern that is repeated every period, or with `slack`
    seconds more.

    Slack may save rounds: a gradient that just misses its place in the round of the stage before waits for the next
    one.

    Attributes:
        hosts: the stages that have heads.
        slices: those that take part in losses: they have rows of the unembedding, or heads.
        orders: each stage's passes, first to last.
    """

    def __init__(
        self,
        times: list[StageTimes],
        micro_batches: int,
        exchange: Exchange,
        pattern: tuple[Kind, ...],
        slack: float = 0.0,
    ):
        self.times, self.micro_batches, self.exchange = times, micro_batches, exchange
        self.hosts = [index for index, stage in enumerate(times) if stage.num_heads]
        self.slices = [
            index for index, stage in enumerate(times) if stage.statistics or stage.gradients or stage.num_heads
        ]
        period = self.period + slack
        first = self._first_starts(pattern, period)

        def start(work: Pass) -> tuple[float, Kind, int]:
            """A pass comes after those it needs, on all stages: they start earlier or, taking no time, are of an
            earlier kind.
            """
            return first[work.stage, work.kind, work.host] + work.micro_batch * period, work.kind, work.micro_batch

        self.orders = []
        for stage in range(len(times)):
            places = itertools.product(self._kinds(stage, pattern), range(micro_batches))
            self.orders.append(sorted((Pass(stage, *place, micro_batch) for place, micro_batch in places), key=start))

    @property
    def period(self) -> float:
        """Of one micro-batch: what the slowest stage takes for it."""
        num_heads = sum(stage.num_heads for stage in self.times)
        return max(stage.total(num_heads) for stage in self.times)

    def with_times(self, times: list[StageTimes], exchange: Exchange) -> "SpreadSchedule":
        """The same orders, in stages and transfers that take other times."""
        other = copy.copy(self)
        other.times, other.exchange = times, exchange
        return other

    def alive(self, stage: int) -> int:
        """The most micro-batches that the stage has between their forward and their backward pass."""
        steps = [{Kind.FORWARD: 1, Kind.BACKWARD: -1}.get(work.kind, 0) for work in self.orders[stage]]
        return max(itertools.accumulate(steps))

    def play(self) -> list[SpreadWork]:
        """Every pass as soon as its stage is free and its data there."""
        ends: dict[Pass, float] = {}
        played: list[SpreadWork] = []
        free, places = [0.0] * len(self.times), [0] * len(self.times)
        total = sum(map(len, self.orders))
        while len(played) < total:
            for stage, order in enumerate(self.orders):
                while places[stage] < len(order) and (arrival := self._arrival(order[places[stage]], ends)) is not None:
                    work = order[places[stage]]
                    start = max(free[stage], arrival)
                    free[stage] = ends[work] = start + self._duration(work.stage, work.kind, work.host)
                    played.append(SpreadWork(work, start, free[stage]))
                    places[stage] += 1
        return played

    def transfers(self) -> list[Transfer]:
        """All of a step, as their data are there when the schedule is played.

        Whoever begins its own in this order, and runs its passes in theirs, has always begun what a pass needs: what
        comes before it here was made by passes that come before it there.
        """
        played, found = self.play(), []
        ready: collections.Counter[tuple[Carries, int, int]] = collections.Counter()
        for index in sorted(range(len(played)), key=lambda index: (played[index].end, index)):
            work = played[index].work
            carried: list[Carries] = []
            if work.kind == Kind.FORWARD:
                carried += [Carries.ACTIVATIONS] if work.stage + 1 < len(self.times) else []
                carried += [Carries.HIDDEN] if work.stage in self.hosts else []
            elif work.kind == Kind.BACKWARD:
                carried += [Carries.GRADIENT] if work.stage else []
            else:
                exchanged = Carries.STATISTICS if work.kind == Kind.STATISTICS else Carries.HIDDEN_GRADIENT
                ready[exchanged, work.host, work.micro_batch] += 1
                carried += [exchanged] if ready[exchanged, work.host, work.micro_batch] == len(self.slices) else []
            found += [Transfer(carries, work.host, work.micro_batch) for carries in carried]
        return found

    def takes_part(self, stage: int, transfer: Transfer) -> bool:
        if transfer.carries in NEIGHBOUR:
            return stage in (transfer.stage, transfer.stage + NEIGHBOUR[transfer.carries])
        return stage in self.slices

    def gives(self, stage: int, transfer: Transfer) -> bool:
        """Of a stage that takes part: whether it has to make something first."""
        return stage == transfer.stage or transfer.carries in (Carries.STATISTICS, Carries.HIDDEN_GRADIENT)

    def _kinds(self, stage: int, pattern: tuple[Kind, ...]) -> list[tuple[Kind, int]]:
        """(kind, host) of what a stage does for each micro-batch, in the pattern's order."""
        found: list[tuple[Kind, int]] = []
        for kind in pattern:
            if kind in (Kind.FORWARD, Kind.BACKWARD):
                found.append((kind, stage))
            elif stage in self.slices:
                found += [(kind, host) for host in self.hosts]
        return found

    def _first_starts(self, pattern: tuple[Kind, ...], period: float) -> dict[tuple[int, Kind, int], float]:
        """When (stage, kind, host) would start for micro-batch 0 if each stage repeated the pattern, once a period,
        without end.

        A stage's round begins with its forward pass; any other pass takes its place in the first round by which its
        data are there.
        """
        first: dict[Pass, float] = {}
        places: list[dict[tuple[Kind, int], float]] = [{} for _ in self.times]
        begin = 0.0
        for stage in range(len(self.times)):
            place = begin
            for kind, host in self._kinds(stage, pattern):
                places[stage][kind, host] = place
                place += self._duration(stage, kind, host)
            first[Pass(stage, Kind.FORWARD, stage, 0)] = begin
            begin += self.times[stage].forward + self.exchange.hand
        ends = {work: start + self._duration(work.stage, work.kind, work.host) for work, start in first.items()}
        losses = itertools.product((Kind.STATISTICS, Kind.GRADIENTS), self.hosts, self.slices)
        sequence = [Pass(stage, kind, host, 0) for kind, host, stage in losses]
        sequence += [Pass(stage, Kind.BACKWARD, stage, 0) for stage in reversed(range(len(self.times)))]
        for work in sequence:
            place = places[work.stage][work.kind, work.host]
            arrival = self._arrival(work, ends)
            assert arrival is not None
            rounds = math.ceil((arrival - place) / period - 1e-9)
            first[work] = max(arrival, place + period * max(0, rounds))
            ends[work] = first[work] + self._duration(work.stage, work.kind, work.host)
        return {(work.stage, work.kind, work.host): start for work, start in first.items()}

    def _duration(self, stage: int, kind: Kind, host: int) -> float:
        times = self.times[stage]
        if kind in (Kind.FORWARD, Kind.BACKWARD):
            return times.forward if kind == Kind.FORWARD else times.backward
        return self.times[host].num_heads * (times.statistics if kind == Kind.STATISTICS else times.gradients)

    def _arrival(self, work: Pass, ends: dict[Pass, float]) -> float | None:
        """When all that a pass needs is there; None while that is not known."""
        needs = self._needs(work)
        if any(need not in ends for need, _ in needs):
            return None
        return max((ends[need] + delay for need, delay in needs), default=0.0)

    def _needs(self, work: Pass) -> list[tuple[Pass, float]]:
        """The passes whose results it works on, and how long those are under way."""
        exchange, stage, micro_batch = self.exchange, work.stage, work.micro_batch
        num_heads = self.times[work.host].num_heads
        if work.kind == Kind.FORWARD:
            return [(Pass(stage - 1, Kind.FORWARD, stage - 1, micro_batch), exchange.hand)] if stage else []
        if work.kind == Kind.STATISTICS:
            delay = 0.0 if stage == work.host else num_heads * exchange.hidden
            return [(Pass(work.host, Kind.FORWARD, work.host, micro_batch), delay)]
        if work.kind == Kind.GRADIENTS:
            delay = num_heads * exchange.statistics
            return [(Pass(index, Kind.STATISTICS, work.host, micro_batch), delay) for index in self.slices]
        needs = [(Pass(stage, Kind.FORWARD, stage, micro_batch), 0.0)]
        if stage + 1 < len(self.times):
            needs.append((Pass(stage + 1, Kind.BACKWARD, stage + 1, micro_batch), exchange.hand))
        if num_heads:
            delay = num_heads * exchange.hidden
            needs += [(Pass(index, Kind.GRADIENTS, stage, micro_batch), delay) for index in self.slices]
        return needs


def fastest_schedule(times: list[StageTimes], micro_batches: int, exchange: Exchange) -> SpreadSchedule:
    """That of the pattern and slack whose step ends first.

    They are compared with few micro-batches, for more of them only repeat what the middle ones do.
    """
    few = min(micro_batches, 4 * len(times))

    def end(pattern: tuple[Kind, ...], slack: float) -> float:
        return max(done.end for done in SpreadSchedule(times, few, exchange, pattern, slack).play())

    slacks = [count * exchange.hand for count in (range(0, 5, 2) if exchange.hand else (0,))]
    pattern, slack = min(itertools.product(PATTERNS, slacks), key=lambda choice: end(*choice))
    return SpreadSchedule(times, micro_batches, exchange, pattern, slack)
