"""Partitions the layers into pipeline stages so that the slowest stage is as fast as possible.

    [embedding] trunk layer 1 | trunk layer 2 ... | ... head 1 | head 2 ... head n        "|": a stage ends

Stages are contiguous ranges of the L layers, trunk layers and then heads, counted from 0. The embedding belongs to the
first layer. Every head uses an unembedding: a stage with a head has a copy of the shared one, or its heads' own.
planning/spread.py has the partition in which losses are spread over all stages instead.

Costs are in FLOPs unless measured costs are given. They do not include the optimizer and the reduction over pipelines.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.heads import head_class, head_order
from megamtp.planning.one_f_one_b import TimedPass, simulate
from megamtp.planning.pass_costs import PassCosts, flop_costs
from megamtp.planning.spread_schedule import TimedStagePass, TransferTimes
from megamtp.planning.stage_memory import StageContents, stage_memory

ENOUGH_MICRO_BATCHES_PER_STAGE = 4


@dataclass(frozen=True)
class Stage:
    """One stage of a partition.

    Attributes:
        first, end: the stage has the layers first, ..., end - 1.
        heads: indices, from 0, of its heads.
        contents: its modules in numbers.
        forward, backward: cost of one micro-batch on one rank. Heads run both passes during the forward pass, unless
            they read each other, so their whole cost is in `forward`; recomputation is in `backward`.
        memory_bytes: bytes of one rank at its peak, by kind.
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
        """The cost of both passes."""
        return self.forward + self.backward

    @property
    def num_layers(self) -> int:
        """The number of trunk layers and heads."""
        return self.end - self.first


@dataclass(frozen=True)
class Partition:
    """All layers as stages that run the 1F1B schedule, each computing the losses of its own heads."""

    stages: list[Stage]
    num_micro_batches: int

    @property
    def costs(self) -> list[float]:
        """The cost of one micro-batch on each stage."""
        return [stage.cost for stage in self.stages]

    @property
    def imbalance(self) -> float:
        """The cost of the slowest stage divided by the mean cost: 1 is perfect."""
        return imbalance(self.costs)

    @property
    def bubble(self) -> float:
        """The share of a step in which the average stage is idle.

        It is (P - 1) / (M + P - 1) for P equal stages and M micro-batches.
        """
        return bubble(self.simulate(), len(self.stages))

    def simulate(self, transfer_time: float = 0.0) -> list[TimedPass]:
        """Returns the passes of one step. Sending a micro-batch takes `transfer_time`, in the unit of the costs."""
        return simulate(
            [stage.forward for stage in self.stages],
            [stage.backward for stage in self.stages],
            self.num_micro_batches,
            transfer_time,
        )

    def step_time(self, transfer_times: TransferTimes) -> float:
        """Returns the time of all micro-batches of a step, in the unit of the costs."""
        return max(timed_pass.end for timed_pass in self.simulate(transfer_times.send_activation))

    def summary(self) -> str:
        """Returns a line for each stage, and `balance_summary`."""
        return "\n".join([*describe_stages(self.stages, self.costs), self.balance_summary])

    @property
    def balance_summary(self) -> str:
        """One line about imbalance and bubble, without transfers."""
        return (
            f"slowest stage / mean {self.imbalance:.3f}; {self.num_micro_batches} micro-batches: predicted bubble "
            f"{self.bubble:.1%}"
        )


def describe_stages(stages: list[Stage], costs: list[float]) -> list[str]:
    """Returns a line for each stage: its share of the costs, its memory and its modules."""
    num_trunk_layers, lines = sum(stage.contents.num_trunk_layers for stage in stages), []
    for index, (stage, cost) in enumerate(zip(stages, costs, strict=True)):
        parts = ["embedding"] if index == 0 else []
        trunk = range(stage.first, min(stage.end, num_trunk_layers))
        parts += [f"trunk {_one_based(trunk)}"] if trunk else []
        parts += [f"{'head' if len(stage.heads) == 1 else 'heads'} {_one_based(stage.heads)}"] if stage.heads else []
        parts += [f"{stage.contents.rows} rows of the unembedding"] if stage.contents.spread else []
        memory_gib = sum(stage.memory_bytes.values()) / 2**30
        lines.append(f"stage {index}: {cost / sum(costs):6.1%} of the work, {memory_gib:7.2f} GiB: {', '.join(parts)}")
    return lines


def data_parallel_rank_and_size(config: Config, rank: int, world_size: int) -> tuple[int, int]:
    """Returns (data_parallel_rank, data_parallel_size) of a rank: its share of a step's micro-batches.

    Neighbouring ranks run the same stage of different pipelines, so that gradients are reduced within a node.

    Raises:
        InputError: the ranks do not divide evenly among the stages.

    Source: deepspeed/runtime/pipe/topology.py, PipeDataParallelTopology.
    """
    num_stages = config.engine.num_stages or 1
    if world_size % num_stages:
        raise InputError(
            f"{world_size} ranks cannot be divided among engine.num_stages={num_stages}; expected a multiple of it: "
            "change the number of ranks or of stages"
        )
    return rank % (world_size // num_stages), world_size // num_stages


def imbalance(times: list[float]) -> float:
    """Returns the largest time divided by the mean time: 1 is perfect."""
    return max(times) * len(times) / sum(times)


def bubble(timed_passes: Sequence[TimedPass | TimedStagePass], num_stages: int) -> float:
    """Returns the share of a simulated step in which the average stage is idle."""
    busy = sum(timed_pass.end - timed_pass.start for timed_pass in timed_passes)
    return 1 - busy / (num_stages * max(timed_pass.end for timed_pass in timed_passes))


def enough_micro_batches(num_stages: int) -> int:
    """Returns the number of micro-batches above which the bubble is small.

    Source: Huang et al. 2019, arXiv:1811.06965, section 2.3.
    """
    return ENOUGH_MICRO_BATCHES_PER_STAGE * num_stages


def whole_loss_partition(config: Config, data_parallel_size: int, costs: PassCosts | None = None) -> Partition:
    """Returns the partition given by engine.stage_layers, or the best partition by `costs` (default: FLOPs).

    Raises:
        InputError: no partition fits engine.stage_memory_bytes.
    """
    costs = costs or flop_costs(config)
    num_stages, num_micro_batches = config.engine.pipeline_stages, config.num_micro_batches(data_parallel_size)
    if config.engine.stage_layers:
        bounds = [0, *accumulate(config.engine.stage_layers)]
    else:
        bounds = _best_bounds(config, data_parallel_size, num_micro_batches, costs)
    stages = [
        make_stage(config, data_parallel_size, num_micro_batches, index, bounds[index], bounds[index + 1], costs)
        for index in range(num_stages)
    ]
    return Partition(stages, num_micro_batches)


def make_stage(
    config: Config, data_parallel_size: int, num_micro_batches: int, index: int, first: int, end: int, costs: PassCosts
) -> Stage:
    """Returns stage `index` with the layers first, ..., end - 1 and the losses of its heads."""
    contents = contents_between(config, first, end)
    forward = costs.trunk_forward(contents) + costs.heads_forward(contents.heads) + costs.losses(contents.heads)
    backward = costs.trunk_backward(contents, config.train.activation_checkpointing)
    if head_class(config.model).is_chain:
        backward += costs.heads_backward(contents.heads)
    else:
        forward += costs.heads_backward(contents.heads)
    num_in_flight = min(config.engine.pipeline_stages - index, num_micro_batches)
    memory_bytes = stage_memory(config, data_parallel_size, contents, num_in_flight)
    return Stage(first, end, heads_between(config, first, end), contents, forward, backward, memory_bytes)


def contents_between(config: Config, first: int, end: int, spread_rows: int | None = None) -> StageContents:
    """Returns the contents of a stage with the layers first, ..., end - 1.

    Args:
        spread_rows: rows of the unembedding, where losses are spread. None: losses are not spread, and a stage with a
            head has all rows.
    """
    heads = heads_between(config, first, end)
    rows = (config.model.vocab_size if heads else 0) if spread_rows is None else spread_rows
    return StageContents(end - first - len(heads), heads, first == 0, rows, spread=spread_rows is not None)


def heads_between(config: Config, first: int, end: int) -> range:
    """Returns the indices, ascending, of the heads among the layers first, ..., end - 1.

    The heads follow the trunk in the order in which they run.
    """
    num_trunk_layers = config.model.num_trunk_layers
    indices = head_order(config.model)[max(first - num_trunk_layers, 0) : max(end - num_trunk_layers, 0)]
    return indices if indices.step > 0 else indices[::-1]


def _best_bounds(config: Config, data_parallel_size: int, num_micro_batches: int, costs: PassCosts) -> list[int]:
    """Returns the first layers of all stages, and the end.

    The slowest stage is as fast as possible; among such partitions, the stages are as even as possible.
    """
    num_layers, num_stages = config.model.num_layers_and_heads, config.engine.pipeline_stages
    limit = config.engine.stage_memory_bytes or math.inf
    stage_costs: dict[tuple[int, int, int], float] = {}
    for index in range(num_stages):
        for first in range(num_layers):
            for end in range(first + 1, num_layers + 1):
                stage = make_stage(config, data_parallel_size, num_micro_batches, index, first, end, costs)
                fits = sum(stage.memory_bytes.values()) <= limit and end not in config.model.inseparable
                stage_costs[index, first, end] = stage.cost if fits else math.inf
    slowest, _ = cheapest_bounds(num_layers, num_stages, lambda *stage: stage_costs[stage], max)
    if slowest == math.inf:
        raise InputError(
            f"no partition of {num_layers} layers into {num_stages} stages fits engine.stage_memory_bytes={limit:.3g} "
            "per rank; raise engine.num_stages, lower train.micro_batch_size or set "
            "train.activation_checkpointing=true"
        )

    def unevenness(stage: int, first: int, end: int) -> float:
        cost = stage_costs[stage, first, end]
        return cost**2 if cost <= slowest else math.inf

    return cheapest_bounds(num_layers, num_stages, unevenness, operator.add)[1]


def cheapest_bounds(
    num_layers: int, num_stages: int, cost: Callable[[int, int, int], float], merge: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """Returns (total cost, bounds) of the cheapest partition, by dynamic programming over stages and layers.

    Args:
        cost: cost(stage, first, end) of one stage.
        merge: combines the costs of two stages; must not fall when an argument rises.
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


def _one_based(indices: range) -> str:
    """Returns `3` or `3-5`: the indices, counted from 1 like heads."""
    first, last = indices[0] + 1, indices[-1] + 1
    return str(first) if first == last else f"{first}-{last}"
