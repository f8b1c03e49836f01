"""Plans of a pipeline, measured by stages and played: the naive cut, the best of whole layers, the best with spread
losses.
"""

import dataclasses
from collections.abc import Iterable

import torch

from benchmarks import stages
from benchmarks.stages import Measured
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
UNIT_LAYERS = 4  # trunk layers of the stage that tells what one costs
LABELS = {
    PassKind.FORWARD: "forward",
    PassKind.BACKWARD: "backward",
    PassKind.STATISTICS: "losses",
    PassKind.GRADIENTS: "losses",
}


class Meter:
    """Measures stages, those with the same contents once."""

    def __init__(self, device: torch.device, micro_batches: int):
        self.device, self.micro_batches = device, micro_batches
        self.found: dict[tuple, Measured] = {}
        self.asked: dict[tuple, set[int]] = {}  # numbers of micro-batches, whether they fit or not

    def measure(self, config: Config, stage: Stage, alive: Iterable[int] = ()) -> Measured:
        """With the peaks of at least `alive`, if they fit."""
        key, alive = stage_key(config, stage), set(alive)
        if key not in self.found or not alive <= self.asked[key]:
            self.asked[key] = alive | self.asked.get(key, set())
            try:
                measured = self.found[key] = stages.measure(
                    config, stage, self.asked[key], self.device, self.micro_batches
                )
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{stage.contents} of a model of width {config.model.dim} does not fit on this card; expected "
                    "stages that do: choose other --sizes, or more --stages"
                ) from None
            passes = ", ".join(
                f"{kind.name.lower()} {seconds * 1e3:.2f} ms" for kind, seconds in measured.seconds.items()
            )
            peaks = ", ".join(
                f"{size / 2**30:.2f} GiB with {count}" for count, size in sorted(measured.peak_bytes.items())
            )
            print(f"{stage.contents}: {passes}{'; ' if peaks else ''}{peaks}", flush=True)
        return self.found[key]


def stage_key(config: Config, stage: Stage) -> tuple:
    """Equal for stages that do the same, with models of one size."""
    contents, model = stage.contents, config.model
    return (
        contents,
        stage.end == model.num_layers,
        model.vocab_size if contents.has_embedding or contents.rows else None,
        model.num_future_tokens if contents.spread and contents.rows else None,
    )


def measured_costs(config: Config, meter: Meter) -> PassCosts:
    """Seconds, from stages with few contents: layers alone, layers and embedding, a head without and with its loss, two
    heads with theirs, a slice of average size."""
    model = config.model
    num_layers = min(UNIT_LAYERS, model.num_trunk_layers - 1)
    layers = _passes(config, meter, first=1, end=1 + num_layers)
    first = _passes(config, meter, first=0, end=num_layers)
    forward, backward = (layers[kind] / num_layers for kind in (PassKind.FORWARD, PassKind.BACKWARD))
    n = model.num_future_tokens
    last = range(n - 1, n)
    head = meter.measure(config, _stage(StageContents(0, last, False, rows=0, spread=True))).seconds
    head_forward, head_backward = head[PassKind.FORWARD], head[PassKind.BACKWARD]
    one = sum(_passes(config, meter, model.num_layers - 1, model.num_layers).values())
    loss, copy = one - head_forward - head_backward, 0.0
    if n > 1:
        two = sum(_passes(config, meter, model.num_layers - 2, model.num_layers).values())
        loss = two - one - head_forward - head_backward
        copy = one - head_forward - head_backward - loss
    rows = max(1, model.vocab_size // (config.engine.num_stages or 1))
    part = meter.measure(config, _stage(StageContents(0, range(0), False, rows, spread=True))).seconds
    embedding = max(0.0, sum(first.values()) - sum(layers.values()))
    return PassCosts(
        layer_forward=forward,
        layer_backward=backward,
        head_forward=(head_forward,) * n,
        head_backward=(head_backward,) * n,
        loss=max(0.0, loss),
        unembedding_copy=max(0.0, copy),
        embedding=embedding,
        slice_statistics=part[PassKind.STATISTICS] / rows,
        slice_gradients=part[PassKind.GRADIENTS] / rows,
    )


def _stage(contents: StageContents) -> Stage:
    """A stage of `contents` alone, for a meter, which does not ask for the place in the model of a stage without
    trunk layers.
    """
    return Stage(1, 1, contents.heads, contents, 0.0, 0.0, {})


def _passes(config: Config, meter: Meter, first: int, end: int) -> dict[PassKind, float]:
    heads, contents = heads_between(config, first, end), contents_between(config, first, end)
    return meter.measure(config, Stage(first, end, heads, contents, 0.0, 0.0, {})).seconds


def naive_layers(config: Config) -> list[int]:
    """Equal numbers of layers, and all heads in the last stage."""
    num_layers, num_stages, n = config.model.num_layers, config.engine.num_stages or 1, config.model.num_future_tokens
    if num_layers // num_stages >= n:
        return _even(num_layers, num_stages)
    return [*_even(num_layers - n, num_stages - 1), n]


def _even(num_layers: int, num_stages: int) -> list[int]:
    return [num_layers // num_stages + (index < num_layers % num_stages) for index in range(num_stages)]


def make_plans(config: Config, pipelines: int, costs: PassCosts, link: Link) -> dict[str, Partition | SpreadPartition]:
    """By name."""
    naive = dataclasses.replace(config, engine=dataclasses.replace(config.engine, stage_layers=naive_layers(config)))
    return {
        NAIVE: whole_loss_partition(naive, pipelines, costs),
        WHOLE: whole_loss_partition(config, pipelines, costs),
        SPREAD: spread_loss_partition(config, pipelines, costs, link.transfer_times(config)),
    }


def alive(plan: Partition | SpreadPartition, stage: int) -> int:
    """The most micro-batches that a stage has between their forward and their backward pass."""
    if isinstance(plan, SpreadPartition):
        return plan.schedule.max_in_flight(stage)
    return min(len(plan.stages) - stage, plan.num_micro_batches)


def play_plan(config: Config, plan: Partition | SpreadPartition, costs: PassCosts, link: Link, meter: Meter) -> dict:
    """What the plan's step takes and each of its stages needs, as measured; and `boxes`, the timeline."""
    measured = [meter.measure(config, stage, [alive(plan, index)]) for index, stage in enumerate(plan.stages)]
    played = (
        _play_spread(config, plan, measured)
        if isinstance(plan, SpreadPartition)
        else _play_whole(config, plan, measured, costs, link)
    )
    boxes, totals, tied_end = played
    step = max(tied_end, *(box.end for box in boxes))
    busy = sum(box.end - box.start for box in boxes)
    return {
        "layers": [stage.num_layers for stage in plan.stages],
        "heads_of_stages": [len(stage.heads) for stage in plan.stages],
        "rows": [stage.contents.rows for stage in plan.stages],
        "step_seconds": step,
        "bubble": 1 - busy / (len(plan.stages) * step),
        "imbalance": imbalance(totals),
        "stage_seconds": totals,
        "pass_seconds": [{kind.name.lower(): seconds for kind, seconds in found.seconds.items()} for found in measured],
        "pass_spreads": [{kind.name.lower(): spread for kind, spread in found.spreads.items()} for found in measured],
        "alive": [alive(plan, index) for index in range(len(plan.stages))],
        "peak_bytes": [found.peak_bytes.get(alive(plan, index)) for index, found in enumerate(measured)],
        "planned_bytes": [sum(stage.memory_bytes.values()) - stage.memory_bytes[OPTIMIZER] for stage in plan.stages],
        "planned_kinds": [stage.memory_bytes for stage in plan.stages],
        "optimizer_bytes": [stage.memory_bytes[OPTIMIZER] for stage in plan.stages],
        "boxes": boxes,
    }


def _play_whole(
    config: Config, plan: Partition, measured: list[Measured], costs: PassCosts, link: Link
) -> tuple[list[Box], list[float], float]:
    """(timeline, seconds of a micro-batch in each stage, end of the reduction of the unembedding's gradients)."""
    forward, backward = ([found.seconds[kind] for found in measured] for kind in (PassKind.FORWARD, PassKind.BACKWARD))
    boxes, last = [], {}
    for work in simulate(forward, backward, plan.num_micro_batches, link.transfer_times(config).send_activation):
        contents = plan.stages[work.stage].contents
        if work.forward and contents.num_heads:
            middle = min(work.end, work.start + contents.num_trunk_layers * costs.layer_forward)
            boxes.append(Box(work.stage, "heads", middle, work.end))
            boxes += [Box(work.stage, "forward", work.start, middle)] if contents.num_trunk_layers else []
        else:
            boxes.append(Box(work.stage, "forward" if work.forward else "backward", work.start, work.end))
        if contents.num_heads:
            last[work.stage] = work.end
    tied_end = max(last.values()) + link.unembedding_reduction(config, len(last))
    return boxes, [sum(pair) for pair in zip(forward, backward, strict=True)], tied_end


def _play_spread(
    config: Config, plan: SpreadPartition, measured: list[Measured]
) -> tuple[list[Box], list[float], float]:
    times = [
        StageTimes(
            found.seconds[PassKind.FORWARD],
            found.seconds[PassKind.BACKWARD],
            found.seconds.get(PassKind.STATISTICS, 0.0),
            found.seconds.get(PassKind.GRADIENTS, 0.0),
            len(stage.heads),
        )
        for stage, found in zip(plan.stages, measured, strict=True)
    ]
    played = plan.schedule.with_times(times, plan.schedule.transfer_times).simulate()
    boxes = [Box(done.stage_pass.stage, LABELS[done.stage_pass.kind], done.start, done.end) for done in played]
    return boxes, [stage.total(config.model.num_future_tokens) for stage in times], 0.0
