"""Layers -> pipeline stages: the contiguous cut whose slowest stage is fastest, weighed in FLOPs, within a rank's memory.

    [embedding] trunk layer 1 | trunk layer 2 ... | ... head 1 | head 2 ... head n        "|": a stage ends

What is cut is the row of L layers, trunk and then heads, from 0. The embedding goes with the first layer and costs no FLOPs; every
head brings a use of the unembedding, and every stage with a head a copy of its weights.

Time is counted in FLOPs: transfers between stages, the optimizer and the reduction of gradients are not in it.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from megamtp.config import Config
from megamtp.engines.one_f_one_b import play
from megamtp.errors import InputError
from megamtp.losses.linear_cross_entropy import default_chunk_rows
from megamtp.model.cost import (
    layer_activation_bytes,
    layer_flops,
    layer_parameters,
    unembedding_flops,
    unembedding_parameters,
)

ENOUGH_MICRO_BATCHES = 4  # per stage, for the bubble to be small. Source: Huang et al. 2019, arXiv:1811.06965, section 2.3


@dataclass(frozen=True)
class Stage:
    """A stage of a cut.

    Attributes:
        first, end: its layers are first, ..., end - 1.
        heads: indices, from 0, of its heads.
        forward_flops, backward_flops: of one micro-batch on one rank. Heads do both when z passes, so all theirs are forward;
            recomputation is backward.
        memory_bytes: of one rank at its peak, by kind.
    """

    first: int
    end: int
    heads: range
    forward_flops: int
    backward_flops: int
    memory_bytes: dict[str, int]

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class Partition:
    """A cut of all layers into stages, and what the 1F1B schedule makes of it."""

    stages: list[Stage]
    micro_batches: int

    @property
    def imbalance(self) -> float:
        """Slowest stage over the mean: 1 is perfect."""
        times = [stage.flops for stage in self.stages]
        return max(times) * len(times) / sum(times)

    @property
    def bubble(self) -> float:
        """The share of a step in which the average stage has nothing to do: (P - 1) / (M + P - 1) if all are alike."""
        forward, backward = ([getattr(stage, kind) for stage in self.stages] for kind in ("forward_flops", "backward_flops"))
        end = max(work.end for work in play(forward, backward, self.micro_batches))
        return 1 - self.micro_batches * sum(forward + backward) / (len(self.stages) * end)

    @property
    def enough_micro_batches(self) -> int:
        """From which on the bubble is small."""
        return ENOUGH_MICRO_BATCHES * len(self.stages)

    def summary(self) -> str:
        """A line for each stage, and one for the whole."""
        total = sum(stage.flops for stage in self.stages)
        num_trunk_layers = self.stages[-1].end - self.stages[-1].heads.stop
        lines = []
        for index, stage in enumerate(self.stages):
            parts = ["embedding"] if index == 0 else []
            trunk = range(stage.first, min(stage.end, num_trunk_layers))
            parts += [f"trunk {_span(trunk)}"] if trunk else []
            parts += [f"{'head' if len(stage.heads) == 1 else 'heads'} {_span(stage.heads)}"] if stage.heads else []
            memory = sum(stage.memory_bytes.values()) / 2**30
            lines.append(f"stage {index}: {stage.flops / total:6.1%} of FLOPs, {memory:7.2f} GiB: {', '.join(parts)}")
        lines.append(
            f"slowest stage / mean {self.imbalance:.3f}; {self.micro_batches} micro-batches: predicted bubble {self.bubble:.1%}"
        )
        return "\n".join(lines)


def partition(config: Config, data_parallel_size: int) -> Partition:
    """The cut given in engine.stage_layers, or else the best one.

    Raises:
        InputError: no cut fits into engine.stage_memory_bytes.
    """
    num_stages, micro_batches = config.engine.num_stages, config.accumulation(data_parallel_size)
    if config.engine.stage_layers:
        bounds = [0, *accumulate(config.engine.stage_layers)]
    else:
        bounds = _best_bounds(config, data_parallel_size, micro_batches)
    stages = [
        make_stage(config, data_parallel_size, micro_batches, index, bounds[index], bounds[index + 1])
        for index in range(num_stages)
    ]
    return Partition(stages, micro_batches)


def make_stage(config: Config, data_parallel_size: int, micro_batches: int, index: int, first: int, end: int) -> Stage:
    """Stage `index` if it has the layers first, ..., end - 1."""
    model, train = config.model, config.train
    heads = range(
        max(first, model.num_trunk_layers) - model.num_trunk_layers, max(end, model.num_trunk_layers) - model.num_trunk_layers
    )
    num_trunk = end - first - len(heads)
    layer = layer_flops(model, train.sequence_length)
    positions = train.micro_batch_size * train.sequence_length
    forward = num_trunk * layer + len(heads) * 3 * (layer + unembedding_flops(model))
    backward = num_trunk * (3 if train.activation_checkpointing else 2) * layer
    alive = min(config.engine.num_stages - index, micro_batches)
    memory = _memory(config, data_parallel_size, alive, num_trunk, len(heads), has_embedding=first == 0)
    return Stage(first, end, heads, positions * forward, positions * backward, memory)


def _memory(
    config: Config, data_parallel_size: int, alive: int, num_trunk: int, num_heads: int, has_embedding: bool
) -> dict[str, int]:
    """Bytes of one rank by kind, with `alive` micro-batches between their forward and their backward pass."""
    model, train = config.model, config.train
    width = 4 if train.precision == "fp32" else 2
    tokens = train.micro_batch_size * train.sequence_length
    vocabulary = model.vocab_size * model.dim
    parameters = (num_trunk + num_heads) * layer_parameters(model)
    parameters += has_embedding * vocabulary + bool(num_heads) * unembedding_parameters(model)
    boundary, saved = tokens * model.dim * width, tokens * layer_activation_bytes(model, width)
    one_layer = saved + 13 * tokens * model.hidden_dim * width // 2  # what a layer needs while its backward pass runs
    rows = config.head_loss.chunk_rows or default_chunk_rows(model.vocab_size, bytes_per_logit=width)
    return {
        "weights": width * parameters,
        "gradients": 4 * parameters,
        "optimizer": 12 * parameters // data_parallel_size,
        # Of each micro-batch: what the stage receives and sends, the heads' dz, and what the trunk layers keep.
        "activations": alive
        * ((2 + bool(num_heads)) * boundary + num_trunk * (boundary if train.activation_checkpointing else saved)),
        "a layer's backward": one_layer,
        "head loss": (4 * vocabulary + rows * model.vocab_size * width) if num_heads else 0,
    }


def _best_bounds(config: Config, data_parallel_size: int, micro_batches: int) -> list[int]:
    """First layers of all stages, and the end: the slowest stage as fast as can be, and then the others as even as can be."""
    num_layers, num_stages, limit = config.model.num_layers, config.engine.num_stages, config.engine.stage_memory_bytes or math.inf
    costs: dict[tuple[int, int, int], float] = {}
    for index in range(num_stages):
        for first in range(num_layers):
            for end in range(first + 1, num_layers + 1):
                stage = make_stage(config, data_parallel_size, micro_batches, index, first, end)
                costs[index, first, end] = stage.flops if sum(stage.memory_bytes.values()) <= limit else math.inf
    slowest, _ = _cheapest_cut(num_layers, num_stages, lambda *place: costs[place], max)
    if slowest == math.inf:
        raise InputError(
            f"no cut of {num_layers} layers into {num_stages} stages fits engine.stage_memory_bytes={limit:.3g} of each rank; "
            "raise engine.num_stages, lower train.micro_batch_size or set train.activation_checkpointing=true"
        )

    def unevenness(*place: int) -> float:
        return costs[place] ** 2 if costs[place] <= slowest else math.inf

    return _cheapest_cut(num_layers, num_stages, unevenness, operator.add)[1]


def _cheapest_cut(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float],
    merge: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """(merged cost of all stages, their bounds) of the cheapest cut, by dynamic programming over (stages, layers) so far.

    `cost(stage, first, end)` is one stage's; `merge` must not fall when an argument grows.
    """
    best: list[tuple[float, list[int]]] = [(cost(0, 0, end), [0, end]) if end else (math.inf, []) for end in range(num_layers + 1)]
    for stage in range(1, num_stages):
        best = [
            min(
                ((merge(best[first][0], cost(stage, first, end)), [*best[first][1], end]) for first in range(stage, end)),
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
