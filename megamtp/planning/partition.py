"""Layers -> pipeline stages: the contiguous cut whose slowest stage is fastest, within a rank's memory.

    [embedding] trunk layer 1 | trunk layer 2 ... | ... head 1 | head 2 ... head n        "|": a stage ends

What is cut is the row of L layers, trunk and then heads, from 0. The embedding goes with the first layer; every head
brings a use of the unembedding, and every stage with a head a copy of its weights. Losses can also be spread:
planning/spread.py.

Time is counted in FLOPs unless measured costs are given; the optimizer and the reduction over pipelines are not in it.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.planning.one_f_one_b import Work, play
from megamtp.planning.pass_costs import PassCosts, flop_costs
from megamtp.planning.spread_schedule import Exchange, SpreadWork
from megamtp.planning.stage_memory import StageContents, stage_memory

ENOUGH_MICRO_BATCHES = 4  # per stage


@dataclass(frozen=True)
class Stage:
    """A stage of a cut.

    Attributes:
        first, end: its layers are first, ..., end - 1.
        heads: indices, from 0, of its heads.
        contents: the same in numbers.
        forward, backward: cost of one micro-batch on one rank. Heads do both when z passes, so all theirs is forward;
            recomputation is backward.
        memory_bytes: of one rank at its peak, by kind.
    """

    first: int
    end: int
    heads: range
    contents: StageContents
    forward: float
    backward: float
    memory_bytes: dict[str, int]

    @property
    def cost(self) -> float:
        return self.forward + self.backward

    @property
    def num_layers(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class Partition:
    """A cut of all layers into stages, and what the 1F1B schedule makes of it."""

    stages: list[Stage]
    micro_batches: int

    @property
    def costs(self) -> list[float]:
        """Of one micro-batch in each stage."""
        return [stage.cost for stage in self.stages]

    @property
    def imbalance(self) -> float:
        """Slowest stage over the mean: 1 is perfect."""
        return imbalance(self.costs)

    @property
    def bubble(self) -> float:
        """The share of a step in which the average stage has nothing to do: (P - 1) / (M + P - 1) if all are alike."""
        return bubble(self.play(), len(self.stages))

    def play(self, link: float = 0.0) -> list[Work]:
        """The step, if handing a micro-batch to the next stage takes `link`, in the unit of the costs."""
        return play(
            [stage.forward for stage in self.stages],
            [stage.backward for stage in self.stages],
            self.micro_batches,
            link,
        )

    def step(self, exchange: Exchange) -> float:
        """Of all micro-batches, in the unit of the costs."""
        return max(work.end for work in self.play(exchange.hand))

    def summary(self) -> str:
        """A line for each stage, and one for the whole."""
        return "\n".join([*stage_lines(self.stages, self.costs), self.outcome])

    @property
    def outcome(self) -> str:
        """The summary's last line. Transfers are not in it."""
        return (
            f"slowest stage / mean {self.imbalance:.3f}; {self.micro_batches} micro-batches: predicted bubble "
            f"{self.bubble:.1%}"
        )


def stage_lines(stages: list[Stage], costs: list[float]) -> list[str]:
    """Each stage's share of the costs, its memory, and what it holds."""
    num_trunk_layers, lines = stages[-1].end - stages[-1].heads.stop, []
    for index, (stage, cost) in enumerate(zip(stages, costs, strict=True)):
        parts = ["embedding"] if index == 0 else []
        trunk = range(stage.first, min(stage.end, num_trunk_layers))
        parts += [f"trunk {_span(trunk)}"] if trunk else []
        parts += [f"{'head' if len(stage.heads) == 1 else 'heads'} {_span(stage.heads)}"] if stage.heads else []
        parts += [f"{stage.contents.rows} rows of the unembedding"] if stage.contents.spread else []
        memory = sum(stage.memory_bytes.values()) / 2**30
        lines.append(f"stage {index}: {cost / sum(costs):6.1%} of the work, {memory:7.2f} GiB: {', '.join(parts)}")
    return lines


def data_parallel_place(config: Config, rank: int, world_size: int) -> tuple[int, int]:
    """(data_parallel_rank, data_parallel_size): which share of every step's micro-batches a rank reads, of how many
    shares.

    Neighbouring ranks hold the same stage of different pipelines, so that within a node gradients are reduced. Source:
    deepspeed/runtime/pipe/topology.py, PipeDataParallelTopology.

    Raises:
        InputError: the ranks do not divide among the stages.
    """
    num_stages = config.engine.num_stages or 1
    if world_size % num_stages:
        raise InputError(
            f"{world_size} ranks do not divide among engine.num_stages={num_stages}; expected a multiple of it: start "
            "as many, or change the stages"
        )
    return rank % (world_size // num_stages), world_size // num_stages


def imbalance(times: list[float]) -> float:
    """Slowest over the mean: 1 is perfect."""
    return max(times) * len(times) / sum(times)


def bubble(played: Sequence[Work | SpreadWork], num_stages: int) -> float:
    """The share of a played step in which the average stage has nothing to do."""
    return 1 - sum(work.end - work.start for work in played) / (num_stages * max(work.end for work in played))


def enough_micro_batches(num_stages: int) -> int:
    """From which on the bubble is small. Source: Huang et al. 2019, arXiv:1811.06965, section 2.3."""
    return ENOUGH_MICRO_BATCHES * num_stages


def partition(config: Config, data_parallel_size: int, costs: PassCosts | None = None) -> Partition:
    """The cut given in engine.stage_layers, or else the best one by `costs`, FLOPs unless given.

    Raises:
        InputError: no cut fits into engine.stage_memory_bytes.
    """
    costs = costs or flop_costs(config)
    num_stages, micro_batches = config.engine.pipeline_stages, config.accumulation(data_parallel_size)
    if config.engine.stage_layers:
        bounds = [0, *accumulate(config.engine.stage_layers)]
    else:
        bounds = _best_bounds(config, data_parallel_size, micro_batches, costs)
    stages = [
        make_stage(config, data_parallel_size, micro_batches, index, bounds[index], bounds[index + 1], costs)
        for index in range(num_stages)
    ]
    return Partition(stages, micro_batches)


def make_stage(
    config: Config, data_parallel_size: int, micro_batches: int, index: int, first: int, end: int, costs: PassCosts
) -> Stage:
    """Stage `index` if it has the layers first, ..., end - 1."""
    contents = contents_between(config, first, end)
    forward = costs.trunk_forward(contents) + costs.heads_and_losses(contents.heads)
    backward = costs.trunk_backward(contents, config.train.activation_checkpointing)
    alive = min(config.engine.pipeline_stages - index, micro_batches)
    memory = stage_memory(config, data_parallel_size, contents, alive)
    return Stage(first, end, heads_between(config, first, end), contents, forward, backward, memory)


def contents_between(config: Config, first: int, end: int, spread_rows: int | None = None) -> StageContents:
    """Of the layers first, ..., end - 1; with so many rows of the unembedding if losses are spread, else with all
    beside a head.
    """
    heads = heads_between(config, first, end)
    rows = (config.model.vocab_size if heads else 0) if spread_rows is None else spread_rows
    return StageContents(end - first - len(heads), heads, first == 0, rows, spread=spread_rows is not None)


def heads_between(config: Config, first: int, end: int) -> range:
    """Indices of the heads among the layers first, ..., end - 1."""
    num_trunk_layers = config.model.num_trunk_layers
    return range(max(first, num_trunk_layers) - num_trunk_layers, max(end, num_trunk_layers) - num_trunk_layers)


def _best_bounds(config: Config, data_parallel_size: int, micro_batches: int, prices: PassCosts) -> list[int]:
    """First layers of all stages, and the end: the slowest stage as fast as can be, and then the others as even as
    can be.
    """
    num_layers, num_stages = config.model.num_layers, config.engine.pipeline_stages
    limit = config.engine.stage_memory_bytes or math.inf
    costs: dict[tuple[int, int, int], float] = {}
    for index in range(num_stages):
        for first in range(num_layers):
            for end in range(first + 1, num_layers + 1):
                stage = make_stage(config, data_parallel_size, micro_batches, index, first, end, prices)
                costs[index, first, end] = stage.cost if sum(stage.memory_bytes.values()) <= limit else math.inf
    slowest, _ = cheapest_cut(num_layers, num_stages, lambda *place: costs[place], max)
    if slowest == math.inf:
        raise InputError(
            f"no cut of {num_layers} layers into {num_stages} stages fits engine.stage_memory_bytes={limit:.3g} of "
            "each rank; raise engine.num_stages, lower train.micro_batch_size or set "
            "train.activation_checkpointing=true"
        )

    def unevenness(stage: int, first: int, end: int) -> float:
        cost = costs[stage, first, end]
        return cost**2 if cost <= slowest else math.inf

    return cheapest_cut(num_layers, num_stages, unevenness, operator.add)[1]


def cheapest_cut(
    num_layers: int, num_stages: int, cost: Callable[[int, int, int], float], merge: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """(merged cost of all stages, their bounds) of the cheapest cut, by dynamic programming over (stages, layers) so
    far.

    `cost(stage, first, end)` is one stage's; `merge` must not fall when an argument grows.
    """
    best: list[tuple[float, list[int]]] = [
        (cost(0, 0, end), [0, end]) if end else (math.inf, []) for end in range(num_layers + 1)
    ]
    for stage in range(1, num_stages):
        best = [
            min(
                (
                    (merge(best[first][0], cost(stage, first, end)), [*best[first][1], end])
                    for first in range(stage, end)
                ),
                key=operator.itemgetter(0),
                default=(math.inf, []),
            )
            for end in range(num_layers + 1)
        ]
    return best[num_layers]


def _span(indices: range) -> str:
    """`3` or `3-5`: counted from 1, as heads are."""
    first, last = indices[0] + 1, indices[-1] + 1
    return str(first) if first == last else f"{first}-{last}"
