"""Partitions the layers into pipeline stages with spread losses.

Layers are not divided, but the rows of the unembedding are: they fill up the faster stages. A stage with rows computes
the logits of these rows for all heads (losses/vocabulary_slice.py), whether they share one unembedding or each has its
own. So there is one copy of each unembedding in total, and no weights are tied. Rows are assigned so that the slowest
stage is as fast as possible; if the layers allow it, all stages take equally long.

engines/spread_pipeline.py runs such a partition. `tools/benchmark.py pipeline` simulates it with measured times.
"""

import itertools
import math
import operator
from dataclasses import dataclass, replace

from megamtp.config import FLOAT8_MULTIPLE, Config
from megamtp.errors import InputError
from megamtp.planning.links import NOMINAL_LINK
from megamtp.planning.partition import (
    Partition,
    Stage,
    bubble,
    cheapest_bounds,
    contents_between,
    describe_stages,
    heads_between,
    imbalance,
    whole_loss_partition,
)
from megamtp.planning.pass_costs import PassCosts, flop_costs
from megamtp.planning.spread_schedule import SpreadSchedule, StageTimes, TransferTimes, fastest_schedule
from megamtp.planning.stage_memory import StageContents, stage_memory

ROW_MULTIPLE, LARGE_SLICE = 128, 1024  # large slices have a multiple of 128 rows, for fast matrix products


@dataclass(frozen=True)
class SpreadPartition:
    """All layers as stages with slices of the unembedding, and their schedule.

    Attributes:
        stages: `forward` and `backward` do not include losses.
        schedule: its times include losses.
    """

    stages: list[Stage]
    schedule: SpreadSchedule

    @property
    def costs(self) -> list[float]:
        """The cost of one micro-batch on each stage, with losses."""
        num_heads = sum(times.num_heads for times in self.schedule.times)
        return [times.total(num_heads) for times in self.schedule.times]

    @property
    def imbalance(self) -> float:
        """The cost of the slowest stage divided by the mean cost: 1 is perfect."""
        return imbalance(self.costs)

    @property
    def bubble(self) -> float:
        """The share of a step in which the average stage is idle, if transfers take no time."""
        return bubble(self.schedule.with_times(self.schedule.times, TransferTimes()).simulate(), len(self.stages))

    def step_time(self, transfer_times: TransferTimes) -> float:
        """Returns the time of all micro-batches of a step, in the unit of the costs."""
        schedule = self.schedule.with_times(self.schedule.times, transfer_times)
        return max(timed_pass.end for timed_pass in schedule.simulate())

    def with_costs(self, config: Config, costs: PassCosts, transfer_times: TransferTimes) -> "SpreadPartition":
        """Returns the same layers, rows and orders with other costs, in the unit of `costs` and `transfer_times`."""
        pass_costs = [_forward_and_backward(config, costs, stage.first, stage.end) for stage in self.stages]
        pairs = list(zip(self.stages, pass_costs, strict=True))
        stages = [replace(stage, forward=forward, backward=backward) for stage, (forward, backward) in pairs]
        times = [_stage_times(stage.contents, both, costs) for stage, both in pairs]
        return SpreadPartition(stages, self.schedule.with_times(times, transfer_times))

    def summary(self) -> str:
        """Returns a line for each stage, and `balance_summary`."""
        return "\n".join([*describe_stages(self.stages, self.costs), self.balance_summary])

    @property
    def balance_summary(self) -> str:
        """One line about imbalance and bubble, without transfers."""
        num_micro_batches = self.schedule.num_micro_batches
        return (
            f"slowest stage / mean {self.imbalance:.3f}; {num_micro_batches} micro-batches: predicted bubble "
            f"{self.bubble:.1%}"
        )


def best_partition(config: Config, data_parallel_size: int) -> Partition | SpreadPartition:
    """Returns the best partition by FLOPs, with whole or spread losses as engine.spread_losses says.

    Raises:
        InputError: it does not fit engine.stage_memory_bytes.
    """
    if config.engine.spread_losses:
        return spread_loss_partition(config, data_parallel_size)
    return whole_loss_partition(config, data_parallel_size)


def spread_loss_partition(
    config: Config, data_parallel_size: int, costs: PassCosts | None = None, transfer_times: TransferTimes | None = None
) -> SpreadPartition:
    """Returns the partition given by engine.stage_layers, or the best partition by `costs` and `transfer_times`.

    Args:
        costs, transfer_times: in the same unit. None: FLOPs, and transfers over the nominal link.

    Raises:
        InputError: the partition does not fit engine.stage_memory_bytes.
    """
    model, costs = config.model, costs or flop_costs(config)
    bounds = list(itertools.pairwise([0, *itertools.accumulate(spread_layers(config, costs))]))
    pass_costs = [_forward_and_backward(config, costs, *pair) for pair in bounds]
    small_multiple = FLOAT8_MULTIPLE if config.resolved_head_loss.precision == "fp8" else 1
    slices_are_large = model.vocab_size >= LARGE_SLICE * config.engine.pipeline_stages
    multiple = ROW_MULTIPLE if slices_are_large else small_multiple
    rows = share_rows([sum(both) for both in pass_costs], _row_cost(config, costs), model.vocab_size, multiple)
    contents = [contents_between(config, *pair, stage_rows) for pair, stage_rows in zip(bounds, rows, strict=True)]
    times = [
        _stage_times(stage_contents, both, costs) for stage_contents, both in zip(contents, pass_costs, strict=True)
    ]
    transfer_times = transfer_times or NOMINAL_LINK.transfer_times(config)
    schedule = fastest_schedule(times, config.num_micro_batches(data_parallel_size), transfer_times)
    stages = [
        Stage(
            *pair,
            heads_between(config, *pair),
            stage_contents,
            *both,
            stage_memory(config, data_parallel_size, stage_contents, schedule.max_in_flight(index)),
        )
        for index, (pair, stage_contents, both) in enumerate(zip(bounds, contents, pass_costs, strict=True))
    ]
    limit = config.engine.stage_memory_bytes or math.inf
    if max(sum(stage.memory_bytes.values()) for stage in stages) > limit:
        raise InputError(
            f"spread losses do not fit engine.stage_memory_bytes={limit:.3g} per rank; raise engine.num_stages, lower "
            "train.micro_batch_size or set train.activation_checkpointing=true"
        )
    return SpreadPartition(stages, schedule)


def spread_layers(config: Config, costs: PassCosts) -> list[int]:
    """Returns each stage's number of layers: engine.stage_layers, or else the best numbers by `costs`.

    In the best partition no stage takes longer than the mean with losses, if that is possible, so that rows of the
    unembedding can fill up all stages; among such partitions, the layers are as even as possible.
    """
    if config.engine.stage_layers:
        return config.engine.stage_layers
    num_layers, num_stages = config.model.num_layers_and_heads, config.engine.pipeline_stages
    losses = _row_cost(config, costs) * config.model.vocab_size

    def cost(_: int, first: int, end: int) -> float:
        if end in config.model.inseparable:
            return math.inf
        return sum(_forward_and_backward(config, costs, first, end))

    slowest, _ = cheapest_bounds(num_layers, num_stages, cost, max)
    limit = max(slowest, (sum(_forward_and_backward(config, costs, 0, num_layers)) + losses) / num_stages)
    _, bounds = cheapest_bounds(
        num_layers, num_stages, lambda *stage: cost(*stage) ** 2 if cost(*stage) <= limit else math.inf, operator.add
    )
    return [end - first for first, end in itertools.pairwise(bounds)]


def share_rows(stage_costs: list[float], row_cost: float, num_rows: int, multiple: int) -> list[int]:
    """Returns the rows of each stage that minimise the largest cost of a stage's layers and rows.

    The numbers of rows are multiples of `multiple`, except for a remainder.
    """
    ascending = sorted(stage_costs)
    for count in range(len(stage_costs), 0, -1):
        level = (sum(ascending[:count]) + num_rows * row_cost) / count
        if level >= ascending[count - 1]:
            break
    exact = [max(0.0, level - cost) / row_cost for cost in stage_costs]
    rows = [int(share / multiple) * multiple for share in exact]
    while (left := num_rows - sum(rows)) > 0:
        stage = max(range(len(stage_costs)), key=lambda index: exact[index] - rows[index])
        rows[stage] += min(multiple, left)
    return rows


def _row_cost(config: Config, costs: PassCosts) -> float:
    return config.model.num_future_tokens * (costs.slice_statistics + costs.slice_gradients)


def _stage_times(contents: StageContents, forward_and_backward: tuple[float, float], costs: PassCosts) -> StageTimes:
    rows = contents.rows
    statistics, gradients = rows * costs.slice_statistics, rows * costs.slice_gradients
    return StageTimes(*forward_and_backward, statistics, gradients, contents.num_heads)


def _forward_and_backward(config: Config, costs: PassCosts, first: int, end: int) -> tuple[float, float]:
    """Returns the (forward, backward) cost of the layers first, ..., end - 1, without losses.

    Only trunk layers are recomputed, never heads.
    """
    contents = contents_between(config, first, end)
    forward = costs.trunk_forward(contents) + costs.heads_forward(contents.heads)
    backward = costs.trunk_backward(contents, config.train.activation_checkpointing)
    return forward, backward + costs.heads_backward(contents.heads)
