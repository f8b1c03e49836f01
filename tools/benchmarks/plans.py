"""Makes three plans of a pipeline, measures their stages and simulates their steps.

The plans are the naive cut, the best cut between layers, and the best cut with spread losses.
"""

import dataclasses
from collections.abc import Iterable

import torch

from benchmarks import stages
from benchmarks.stages import StageMeasurement
from benchmarks.timeline import Box
from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.planning.links import Link
from megamtp.planning.one_f_one_b import simulate
from megamtp.planning.partition import (
    Partition,
    Stage,
    contents_between,
    heads_between,
    imbalance,
    whole_loss_partition,
)
from megamtp.planning.pass_costs import PassCosts
from megamtp.planning.spread import SpreadPartition, spread_loss_partition
from megamtp.planning.spread_schedule import PassKind, StageTimes
from megamtp.planning.stage_memory import OPTIMIZER, StageContents

NAIVE, WHOLE, SPREAD = "naive", "whole layers", "spread losses"
UNIT_LAYERS = 4  # trunk layers of the stage that measures the cost of one layer
LABELS = {
    PassKind.FORWARD: "forward",
    PassKind.BACKWARD: "backward",
    PassKind.STATISTICS: "losses",
    PassKind.GRADIENTS: "losses",
}


class Meter:
    """Measures stages. Stages with the same contents are measured once."""

    def __init__(self, device: torch.device, micro_batches: int):
        self.device, self.micro_batches = device, micro_batches
        self.measurements: dict[tuple, StageMeasurement] = {}
        self.counts: dict[tuple, set[int]] = {}  # requested numbers of micro-batches in flight, whether they fit or not

    def measure(self, config: Config, stage: Stage, in_flight: Iterable[int] = ()) -> StageMeasurement:
        """Returns times, and peaks for at least the numbers of micro-batches in `in_flight`, if they fit."""
        key, in_flight = stage_key(config, stage), set(in_flight)
        if key not in self.measurements or not in_flight <= self.counts[key]:
            self.counts[key] = in_flight | self.counts.get(key, set())
            try:
                measured = self.measurements[key] = stages.measure(
                    config, stage, self.counts[key], self.device, self.micro_batches
                )
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{stage.contents} of a model of width {config.model.dim} does not fit on this card; expected "
                    "smaller stages: choose other --sizes, or more --stages"
                ) from None
            passes = ", ".join(
                f"{kind.name.lower()} {seconds * 1e3:.2f} ms" for kind, seconds in measured.seconds.items()
            )
            peaks = ", ".join(
                f"{size / 2**30:.2f} GiB with {count} in flight" for count, size in sorted(measured.peak_bytes.items())
            )
            print(f"{stage.contents}: {passes}{'; ' if peaks else ''}{peaks}", flush=True)
        return self.measurements[key]


def stage_key(config: Config, stage: Stage) -> tuple:
    """Returns a key that is equal for stages with the same work, among models of one size."""
    contents, model = stage.contents, config.model
    return (
        contents,
        stage.end == model.num_layers_and_heads,
        model.vocab_size if contents.has_embedding or contents.rows else None,
        model.num_future_tokens if contents.spread and contents.rows else None,
    )


def measured_costs(config: Config, meter: Meter) -> PassCosts:
    """Returns the seconds of each kind of work, from measurements of small stages.

    The stages are: layers alone; layers and the embedding; a head without its loss; a head with its loss; two heads
    with their losses; a slice of average size.
    """
    model = config.model
    num_layers = min(UNIT_LAYERS, model.num_trunk_layers - 1)
    layers = _passes(config, meter, first=1, end=1 + num_layers)
    with_embedding = _passes(config, meter, first=0, end=num_layers)
    forward, backward = (layers[kind] / num_layers for kind in (PassKind.FORWARD, PassKind.BACKWARD))
    n = model.num_future_tokens
    last_head = range(n - 1, n)
    head = meter.measure(config, _stage(StageContents(0, last_head, False, rows=0, spread=True))).seconds
    head_forward, head_backward = head[PassKind.FORWARD], head[PassKind.BACKWARD]
    one_head = sum(_passes(config, meter, model.num_layers_and_heads - 1, model.num_layers_and_heads).values())
    # One head costs its passes, a loss and, once per stage, the copy of the unembedding (PassCosts.unembedding_copy). A
    # second head costs its passes and a loss. Loss and copy cannot be separated if n = 1: both count as the loss.
    loss, unembedding_copy = one_head - head_forward - head_backward, 0.0
    if n > 1:
        two_heads = sum(_passes(config, meter, model.num_layers_and_heads - 2, model.num_layers_and_heads).values())
        loss = two_heads - one_head - head_forward - head_backward
        unembedding_copy = one_head - head_forward - head_backward - loss
    rows = max(1, model.vocab_size // config.engine.pipeline_stages)
    slice_seconds = meter.measure(config, _stage(StageContents(0, range(0), False, rows, spread=True))).seconds
    embedding = max(0.0, sum(with_embedding.values()) - sum(layers.values()))
    return PassCosts(
        layer_forward=forward,
        layer_backward=backward,
        head_forward=(head_forward,) * n,
        head_backward=(head_backward,) * n,
        loss=max(0.0, loss),
        unembedding_copy=max(0.0, unembedding_copy),
        embedding=embedding,
        slice_statistics=slice_seconds[PassKind.STATISTICS] / rows,
        slice_gradients=slice_seconds[PassKind.GRADIENTS] / rows,
    )


def _stage(contents: StageContents) -> Stage:
    """Returns a stage with `contents` and no trunk layers. Its position in the model does not matter to a meter."""
    return Stage(1, 1, contents.heads, contents, forward=0.0, backward=0.0, memory_bytes={})


def _passes(config: Config, meter: Meter, first: int, end: int) -> dict[PassKind, float]:
    heads, contents = heads_between(config, first, end), contents_between(config, first, end)
    stage = Stage(first, end, heads, contents, forward=0.0, backward=0.0, memory_bytes={})
    return meter.measure(config, stage).seconds


def naive_layers(config: Config) -> list[int]:
    """Returns equal numbers of layers per stage, with all heads in the last stage."""
    num_layers, num_stages, n = (
        config.model.num_layers_and_heads,
        config.engine.pipeline_stages,
        config.model.num_future_tokens,
    )
    if num_layers // num_stages >= n:
        return _even(num_layers, num_stages)
    return [*_even(num_layers - n, num_stages - 1), n]


def _even(num_layers: int, num_stages: int) -> list[int]:
    return [num_layers // num_stages + (index < num_layers % num_stages) for index in range(num_stages)]


def make_plans(config: Config, pipelines: int, costs: PassCosts, link: Link) -> dict[str, Partition | SpreadPartition]:
    """Returns the three plans by name."""
    naive = dataclasses.replace(config, engine=dataclasses.replace(config.engine, stage_layers=naive_layers(config)))
    return {
        NAIVE: whole_loss_partition(naive, pipelines, costs),
        WHOLE: whole_loss_partition(config, pipelines, costs),
        SPREAD: spread_loss_partition(config, pipelines, costs, link.transfer_times(config)),
    }


def max_in_flight(plan: Partition | SpreadPartition, stage: int) -> int:
    """Returns the largest number of micro-batches of a stage between their forward and backward passes."""
    if isinstance(plan, SpreadPartition):
        return plan.schedule.max_in_flight(stage)
    return min(len(plan.stages) - stage, plan.num_micro_batches)


def simulate_plan(
    config: Config, plan: Partition | SpreadPartition, costs: PassCosts, link: Link, meter: Meter
) -> dict:
    """Returns the simulated step of a plan, the measurements of its stages, and `boxes`, its timeline."""
    measurements = [
        meter.measure(config, stage, [max_in_flight(plan, index)]) for index, stage in enumerate(plan.stages)
    ]
    simulated = (
        _simulate_spread(config, plan, measurements)
        if isinstance(plan, SpreadPartition)
        else _simulate_whole(config, plan, measurements, costs, link)
    )
    boxes, stage_seconds, reduction_end = simulated
    step = max(reduction_end, *(box.end for box in boxes))
    busy = sum(box.end - box.start for box in boxes)
    return {
        "layers": [stage.num_layers for stage in plan.stages],
        "heads_of_stages": [len(stage.heads) for stage in plan.stages],
        "rows": [stage.contents.rows for stage in plan.stages],
        "step_seconds": step,
        "bubble": 1 - busy / (len(plan.stages) * step),
        "imbalance": imbalance(stage_seconds),
        "stage_seconds": stage_seconds,
        "pass_seconds": [
            {kind.name.lower(): seconds for kind, seconds in measurement.seconds.items()}
            for measurement in measurements
        ],
        "pass_spreads": [
            {kind.name.lower(): spread for kind, spread in measurement.spreads.items()} for measurement in measurements
        ],
        "alive": [max_in_flight(plan, index) for index in range(len(plan.stages))],
        "peak_bytes": [
            measurement.peak_bytes.get(max_in_flight(plan, index)) for index, measurement in enumerate(measurements)
        ],
        "planned_bytes": [sum(stage.memory_bytes.values()) - stage.memory_bytes[OPTIMIZER] for stage in plan.stages],
        "planned_kinds": [stage.memory_bytes for stage in plan.stages],
        "optimizer_bytes": [stage.memory_bytes[OPTIMIZER] for stage in plan.stages],
        "boxes": boxes,
    }


def _simulate_whole(
    config: Config, plan: Partition, measurements: list[StageMeasurement], costs: PassCosts, link: Link
) -> tuple[list[Box], list[float], float]:
    """Simulates the 1F1B schedule.

    Returns:
        (timeline, seconds of a micro-batch on each stage, end of the reduction of the unembedding's gradients)
    """
    forward, backward = (
        [measurement.seconds[kind] for measurement in measurements] for kind in (PassKind.FORWARD, PassKind.BACKWARD)
    )
    boxes, last_end = [], {}
    for work in simulate(forward, backward, plan.num_micro_batches, link.transfer_times(config).send_activation):
        contents = plan.stages[work.stage].contents
        if work.forward and contents.num_heads:
            middle = min(work.end, work.start + contents.num_trunk_layers * costs.layer_forward)
            boxes.append(Box(work.stage, "heads", middle, work.end))
            boxes += [Box(work.stage, "forward", work.start, middle)] if contents.num_trunk_layers else []
        else:
            boxes.append(Box(work.stage, "forward" if work.forward else "backward", work.start, work.end))
        if contents.num_heads:
            last_end[work.stage] = work.end
    reduction_end = max(last_end.values()) + link.unembedding_reduction(config, len(last_end))
    return boxes, [sum(pair) for pair in zip(forward, backward, strict=True)], reduction_end


def _simulate_spread(
    config: Config, plan: SpreadPartition, measurements: list[StageMeasurement]
) -> tuple[list[Box], list[float], float]:
    """Returns what _simulate_whole returns. No two stages have the same rows of the unembedding: none are reduced."""
    times = [
        StageTimes(
            measurement.seconds[PassKind.FORWARD],
            measurement.seconds[PassKind.BACKWARD],
            measurement.seconds.get(PassKind.STATISTICS, 0.0),
            measurement.seconds.get(PassKind.GRADIENTS, 0.0),
            len(stage.heads),
        )
        for stage, measurement in zip(plan.stages, measurements, strict=True)
    ]
    simulated = plan.schedule.with_times(times, plan.schedule.transfer_times).simulate()
    boxes = [Box(timed.stage_pass.stage, LABELS[timed.stage_pass.kind], timed.start, timed.end) for timed in simulated]
    return boxes, [stage.total(config.model.num_future_tokens) for stage in times], 0.0
