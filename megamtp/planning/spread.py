"""The best plan whose losses are spread by vocabulary: layers stay whole, and the unembedding's rows fill the stages
up.

Every stage holds some rows of the unembedding, perhaps none, and computes those columns of all heads' logits
(losses/vocabulary_slice.py); there is one copy of the unembedding in all, cut, and none is tied. Rows are shared out so
that the slowest stage is as fast as can be; where layers leave room for it, all stages are then alike.

This plans; engines/spread_pipeline.py runs it, and tools/benchmark.py pipeline plays it with measured times.
"""

import itertools
import math
import operator
from dataclasses import dataclass, replace

from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.planning.links import NOMINAL
from megamtp.planning.partition import (
    Partition,
    Stage,
    bubble,
    cheapest_cut,
    contents_between,
    heads_between,
    imbalance,
    partition,
    stage_lines,
)
from megamtp.planning.pass_costs import PassCosts, flop_costs
from megamtp.planning.spread_schedule import Exchange, SpreadSchedule, StageTimes, fastest_schedule
from megamtp.planning.stage_memory import StageContents, stage_memory

ROW_MULTIPLE, LARGE_SLICE = 128, 1024  # rows of large slices are a multiple: what matrix products like
FLOAT8_MULTIPLE = 16  # rows of a slice, as fp8 products need


@dataclass(frozen=True)
class SpreadPartition:
    """A cut of all layers into stages with slices of the unembedding, and what its schedule makes of it.

    Attributes:
        stages: `forward` and `backward` are without losses.
        schedule: of the same, with losses.
    """

    stages: list[Stage]
    schedule: SpreadSchedule

    @property
    def costs(self) -> list[float]:
        """Of one micro-batch in each stage, losses included."""
        num_heads = sum(times.num_heads for times in self.schedule.times)
        return [times.total(num_heads) for times in self.schedule.times]

    @property
    def imbalance(self) -> float:
        """Slowest stage over the mean: 1 is perfect."""
        return imbalance(self.costs)

    @property
    def bubble(self) -> float:
        """The share of a step in which the average stage has nothing to do, transfers apart."""
        return bubble(self.schedule.with_times(self.schedule.times, Exchange()).play(), len(self.stages))

    def step(self, exchange: Exchange) -> float:
        """Of all micro-batches, in the unit of the costs."""
        return max(done.end for done in self.schedule.with_times(self.schedule.times, exchange).play())

    def priced(self, config: Config, costs: PassCosts, exchange: Exchange) -> "SpreadPartition":
        """The same layers, rows and orders, in the unit of `costs` and `exchange`."""
        passes = [_passes(config, costs, stage.first, stage.end) for stage in self.stages]
        pairs = list(zip(self.stages, passes, strict=True))
        stages = [replace(stage, forward=forward, backward=backward) for stage, (forward, backward) in pairs]
        times = [_times(stage.contents, both, costs) for stage, both in pairs]
        return SpreadPartition(stages, self.schedule.with_times(times, exchange))

    def summary(self) -> str:
        """A line for each stage, and one for the whole."""
        return "\n".join([*stage_lines(self.stages, self.costs), self.outcome])

    @property
    def outcome(self) -> str:
        """The summary's last line. Transfers are not in it."""
        micro_batches = self.schedule.micro_batches
        return (
            f"slowest stage / mean {self.imbalance:.3f}; {micro_batches} micro-batches: predicted bubble "
            f"{self.bubble:.1%}"
        )


def best_cut(config: Config, data_parallel_size: int) -> Partition | SpreadPartition:
    """The best one by FLOPs, as engine.spread_losses asks for it; see `spread` and `partition`.

    Raises:
        InputError: it does not fit into engine.stage_memory_bytes.
    """
    if config.engine.spread_losses:
        return spread(config, data_parallel_size)
    return partition(config, data_parallel_size)


def spread(
    config: Config, data_parallel_size: int, costs: PassCosts | None = None, exchange: Exchange | None = None
) -> SpreadPartition:
    """The one with engine.stage_layers, or else the best one, by `costs` and `exchange`, in one unit: FLOPs unless
    given.

    Raises:
        InputError: it does not fit into engine.stage_memory_bytes.
    """
    model, costs = config.model, costs or flop_costs(config)
    pairs = list(itertools.pairwise([0, *itertools.accumulate(spread_layers(config, costs))]))
    passes = [_passes(config, costs, *pair) for pair in pairs]
    small = FLOAT8_MULTIPLE if config.head_loss.precision == "fp8" else 1
    multiple = ROW_MULTIPLE if model.vocab_size >= LARGE_SLICE * config.engine.pipeline_stages else small
    shares = share_rows([sum(both) for both in passes], _row_cost(config, costs), model.vocab_size, multiple)
    contents = [contents_between(config, *pair, rows) for pair, rows in zip(pairs, shares, strict=True)]
    times = [_times(held, both, costs) for held, both in zip(contents, passes, strict=True)]
    schedule = fastest_schedule(times, config.accumulation(data_parallel_size), exchange or NOMINAL.exchange(config))
    stages = [
        Stage(
            *pair,
            heads_between(config, *pair),
            held,
            *both,
            stage_memory(config, data_parallel_size, held, schedule.alive(index)),
        )
        for index, (pair, held, both) in enumerate(zip(pairs, contents, passes, strict=True))
    ]
    found, limit = SpreadPartition(stages, schedule), config.engine.stage_memory_bytes or math.inf
    if max(sum(stage.memory_bytes.values()) for stage in stages) > limit:
        raise InputError(
            f"spread losses do not fit engine.stage_memory_bytes={limit:.3g} of each rank; raise engine.num_stages, "
            "lower train.micro_batch_size or set train.activation_checkpointing=true"
        )
    return found


def spread_layers(config: Config, costs: PassCosts) -> list[int]:
    """engine.stage_layers, or else layers as even, by `costs`, as can be where rows of the unembedding can fill the
    rest up.
    """
    if config.engine.stage_layers:
        return config.engine.stage_layers
    num_layers, num_stages = config.model.num_layers, config.engine.pipeline_stages
    losses = _row_cost(config, costs) * config.model.vocab_size

    def cost(_: int, first: int, end: int) -> float:
        return sum(_passes(config, costs, first, end))

    slowest, _ = cheapest_cut(num_layers, num_stages, cost, max)
    level = max(slowest, (sum(_passes(config, costs, 0, num_layers)) + losses) / num_stages)
    _, bounds = cheapest_cut(
        num_layers, num_stages, lambda *place: cost(*place) ** 2 if cost(*place) <= level else math.inf, operator.add
    )
    return [end - first for first, end in itertools.pairwise(bounds)]


def share_rows(levels: list[float], row_cost: float, num_rows: int, multiple: int) -> list[int]:
    """Rows of each stage that make the highest of level + rows * row_cost lowest: multiples of `multiple` but for a
    remainder.
    """
    lowest = sorted(levels)
    for count in range(len(levels), 0, -1):
        level = (sum(lowest[:count]) + num_rows * row_cost) / count
        if level >= lowest[count - 1]:
            break
    exact = [max(0.0, level - own) / row_cost for own in levels]
    shares = [int(rows / multiple) * multiple for rows in exact]
    while (left := num_rows - sum(shares)) > 0:
        stage = max(range(len(levels)), key=lambda index: exact[index] - shares[index])
        shares[stage] += min(multiple, left)
    return shares


def _row_cost(config: Config, costs: PassCosts) -> float:
    return config.model.num_future_tokens * (costs.slice_statistics + costs.slice_gradients)


def _times(contents: StageContents, passes: tuple[float, float], costs: PassCosts) -> StageTimes:
    rows = contents.rows
    return StageTimes(*passes, rows * costs.slice_statistics, rows * costs.slice_gradients, contents.num_heads)


def _passes(config: Config, costs: PassCosts, first: int, end: int) -> tuple[float, float]:
    """(forward, backward) of the layers first, ..., end - 1 without losses. Heads are never recomputed."""
    contents = contents_between(config, first, end)
    forward = costs.trunk_forward(contents) + costs.heads_forward(contents.heads)
    backward = costs.trunk_backward(contents, config.train.activation_checkpointing)
    return forward, backward + costs.heads_backward(contents.heads)
