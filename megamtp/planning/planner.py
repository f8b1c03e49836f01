"""What a configuration needs on a cluster, before renting it: memory of a rank by kind, and the time of a step.

Sources: bytes from what the engines keep (engines/deepspeed/gather.py and scatter.py, stage_memory.py,
losses/linear_cross_entropy.py); rates, and what a layer saves for its backward pass, from the steps in tools/results,
which predictions are tested against.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megamtp.cluster.network import Network
from megamtp.config import Config
from megamtp.errors import InputError
from megamtp.model.cost import (
    head_cost,
    head_parameters,
    layer_cost,
    layer_parameters,
    parameters,
    unembedding_parameters,
)
from megamtp.model.layers import LayerCost
from megamtp.optimizers.kinds import optimizer_kind
from megamtp.planning.links import Link
from megamtp.planning.partition import Partition, data_parallel_place, partition
from megamtp.planning.pass_costs import PassCosts
from megamtp.planning.spread import SpreadPartition, spread, spread_layers
from megamtp.planning.stage_memory import OPTIMIZER, chunk_bytes

DAY = 86400.0


@dataclass(frozen=True)
class Card:
    """A GPU as measured in bf16.

    Attributes:
        memory_bytes: what a process can have of it.
        matrix_flops: FLOP/s of large matrix products.
        attention_flops: FLOP/s of attention, causal products counted at half.
        memory_bandwidth: bytes/s.
        float8_speedup: rate of the loss's fp8 products over that of the same in bf16.
    """

    memory_bytes: float
    matrix_flops: float
    attention_flops: float
    memory_bandwidth: float
    multiprocessors: int
    float8_speedup: float


# Rates, and the bytes, are fitted to the "plain" steps of tools/results/overhead*.json, of both cards (2026-11-28 and
# -29). They compute alike; what moves memory tells them apart.
CARDS = {"h100": Card(79e9, 712e12, 246e12, 2.8e12, 132, 1.8), "h200": Card(140e9, 712e12, 246e12, 4.0e12, 132, 1.8)}
# That a layer's norms, rotation, activation and sums read and write for an element of the residual stream, forward and
# backward.
ELEMENT_BYTES = 102


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank at its peak by kind, and seconds of one optimizer step.

    Attributes:
        memory: of a pipeline, those of its largest stage.
        host_memory: on the CPU, beside the process's own; of a pipeline, those of the stage with the most parameters.
        checkpoint_bytes: on disk, all ranks' together.
        compute: forward and backward passes of all micro-batches, as if nothing were communicated; of a pipeline's
            average stage.
        exposed: communication that nothing hides, and what communication takes from computation; of a pipeline, waiting
            for others.
        update: the optimizer; None on the host, whose speed is not known.
        cut: of a pipeline.
    """

    memory: Mapping[str, float]
    host_memory: Mapping[str, float]
    checkpoint_bytes: int
    micro_batches: int
    compute: float
    exposed: float
    update: float | None
    cut: Partition | SpreadPartition | None = None

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Without an optimizer on the host."""
        return self.compute + self.exposed + (self.update or 0.0)


def plan(config: Config, world_size: int, card: Card) -> Plan:
    """Under ZeRO-3 with grouped communication, or in a pipeline, in bf16, with sequential heads.

    Raises:
        InputError: another engine, precision or schedule, or a batch that does not divide.
    """
    engine = config.engine
    found = (
        f"engine.kind={engine.kind}, engine.communication={engine.communication}, "
        f"train.precision={config.train.precision}"
    )
    if found == "engine.kind=pipeline, engine.communication=grouped, train.precision=bf16":
        return _plan_pipeline(config, world_size, card)
    if found != "engine.kind=zero3, engine.communication=grouped, train.precision=bf16":
        raise InputError(f"{found}: not measured, so not planned; expected zero3 or pipeline, grouped and bf16")
    if engine.head_schedule != "sequential":
        raise InputError(
            f"engine.head_schedule={engine.head_schedule}: not measured, so not planned; expected sequential"
        )
    micro_batches = config.accumulation(world_size)
    compute, exposed = _micro_batch_seconds(config, world_size, card)
    share = parameters(config.model) / world_size
    update = None if engine.offload_optimizer else _update_seconds(share, card)
    return Plan(
        _memory(config, world_size),
        _host_memory(config, share),
        _checkpoint_bytes(config),
        micro_batches,
        micro_batches * compute,
        micro_batches * exposed,
        update,
    )


def _update_seconds(parameters: float, card: Card) -> float:
    return 30 * parameters / card.memory_bandwidth  # 16 bytes read, 14 written


def _plan_pipeline(config: Config, world_size: int, card: Card) -> Plan:
    """The cut that is fastest by the card's rates, and its schedule as it is played; pipelines' gradients are reduced
    after it.

    Where losses are spread, rows and orders are those that a run gives to the cut's layers.
    """
    _, pipelines = data_parallel_place(config, 0, world_size)
    cluster, engine, costs = config.cluster, config.engine, _pass_costs(config, card)
    exchange = Link(cluster.flat_bandwidth or cluster.network_bandwidth, cluster.latency).exchange(config)
    cut: Partition | SpreadPartition
    if engine.spread_losses:
        given = dataclasses.replace(engine, stage_layers=spread_layers(config, costs))
        cut = spread(dataclasses.replace(config, engine=given), pipelines).priced(config, costs, exchange)
    else:
        cut = partition(config, pipelines, costs)
    micro_batches = config.accumulation(pipelines)
    compute = micro_batches * sum(cut.costs) / len(cut.costs)
    largest = max(cut.stages, key=lambda stage: sum(stage.memory_bytes.values()))
    weights = max(stage.memory_bytes["weights"] for stage in cut.stages)
    network = Network(dataclasses.replace(cluster, emulate=pipelines))
    # DeepSpeed's pipeline sums whole gradients, though each pipeline keeps a shard of them.
    reduction = network.seconds("all_reduce", weights * _widening(config)) + network.seconds("all_gather", weights)
    exposed = cut.step(exchange) - compute + reduction
    share = max(stage.memory_bytes[OPTIMIZER] for stage in cut.stages) / _state_bytes(config)
    return Plan(
        largest.memory_bytes,
        _host_memory(config, share),
        _checkpoint_bytes(config),
        micro_batches,
        compute,
        exposed,
        _update_seconds(weights / 2 / pipelines, card),
        cut,
    )


def _pass_costs(config: Config, card: Card) -> PassCosts:
    """Seconds. Each micro-batch's gradients are added to the fp32 sums: 10 bytes read and written."""
    model, n = config.model, config.model.num_future_tokens
    tokens, adding = config.train.micro_batch_size * config.train.sequence_length, 10 / card.memory_bandwidth
    forward, product = _layer_seconds(config, card), 2 * tokens * model.dim / card.matrix_flops
    heads = _head_seconds(config, card)
    saved = _float8_heads(config) / n * (1 - 1 / card.float8_speedup)  # of a product, by heads in fp8
    return PassCosts(
        layer_forward=forward,
        layer_backward=2 * forward + adding * layer_parameters(model),
        head_forward=tuple(heads),
        head_backward=tuple(2 * head + adding * head_parameters(model, index) for index, head in enumerate(heads)),
        loss=model.vocab_size * product * (3 - 2 * saved),
        copy=adding * unembedding_parameters(model),
        embedding=adding * model.vocab_size * model.dim,
        slice_statistics=product * (1 - saved),
        slice_gradients=product * (2 - saved),
    )


def _layer_seconds(config: Config, card: Card) -> float:
    """Of a trunk layer's forward pass of one micro-batch."""
    return _tokens(config) * _position_seconds(layer_cost(config.model, config.train.sequence_length), card)


def _head_seconds(config: Config, card: Card) -> list[float]:
    """Of each head's forward pass of one micro-batch, without its loss."""
    costs = [
        head_cost(config.model, index, config.train.sequence_length) for index in range(config.model.num_future_tokens)
    ]
    return [_tokens(config) * _position_seconds(cost, card) for cost in costs]


def _tokens(config: Config) -> int:
    return config.train.micro_batch_size * config.train.sequence_length


def _position_seconds(cost: LayerCost, card: Card) -> float:
    return (
        cost.matrix_flops / card.matrix_flops
        + cost.attention_flops / card.attention_flops
        + cost.streamed_elements * ELEMENT_BYTES / 3 / card.memory_bandwidth
    )


def _memory(config: Config, world_size: int) -> dict[str, float]:
    model, tokens = config.model, config.train.micro_batch_size * config.train.sequence_length
    share = parameters(model) / world_size
    layer, vocabulary = 2 * layer_parameters(model), 2 * model.vocab_size * model.dim
    largest = max(layer, *(2 * head_parameters(model, index) for index in range(model.num_future_tokens)))
    saved = 2 * tokens * layer_cost(model, config.train.sequence_length).kept_elements
    costs = [head_cost(model, index, config.train.sequence_length) for index in range(model.num_future_tokens)]
    saved_by_head = 2 * tokens * max(cost.kept_elements for cost in costs)
    trunk = model.num_trunk_layers
    boundaries = 2 * tokens * model.dim * trunk
    chunk = chunk_bytes(config, width=2)
    # dW in fp32 and as it is sent, and a chunk of logits; in fp8 also two copies of the weight, one of hidden, and one
    # of the chunk's gradient.
    sent = _widening(config)
    head_loss = (2 + sent) * vocabulary + chunk
    head_loss += vocabulary + tokens * model.dim + chunk // 2 if _float8_heads(config) else 0
    on_device, gathers = 0 if config.engine.offload_optimizer else 1, world_size > 1 or config.engine.offload_parameters
    return {
        "weights": 0 if config.engine.offload_parameters else 2 * share,
        "gradients": 4 * share * on_device,
        "optimizer": _state_bytes(config) * share * on_device,
        "gathered weights": (1 + config.engine.prefetch_modules) * largest + 2 * vocabulary if gathers else 0,
        "gradients on their way": sent * largest,
        "activations": boundaries + max(saved, saved_by_head)
        if config.train.activation_checkpointing
        else trunk * saved + saved_by_head,
        "a layer's backward": 13 * tokens * model.hidden_dim,
        "head loss": head_loss,
    }


def _host_memory(config: Config, share: float) -> dict[str, float]:
    """`share`: parameters of which the rank keeps the optimizer's state. It is copied for a checkpoint wherever it
    is kept.
    """
    engine = config.engine
    return {
        "copy that a checkpoint is written from": _state_bytes(config) * share,
        "offloaded gradients and optimizer": (4 + _state_bytes(config)) * share * engine.offload_optimizer,
        "offloaded weights": 2 * share * engine.offload_parameters,
    }


def _checkpoint_bytes(config: Config) -> int:
    return _state_bytes(config) * parameters(config.model)


def _micro_batch_seconds(config: Config, world_size: int, card: Card) -> tuple[float, float]:
    """(computing, exposed) of one micro-batch's forward and backward pass."""
    model, tokens = config.model, config.train.micro_batch_size * config.train.sequence_length
    forward, heads = _layer_seconds(config, card), _head_seconds(config, card)
    product = 2 * tokens * model.vocab_size * model.dim / card.matrix_flops
    float8_heads = _float8_heads(config)
    losses = 3 * product * model.num_future_tokens - 2 * product * float8_heads * (1 - 1 / card.float8_speedup)
    if float8_heads:  # the weight is read for its largest element, and to be written twice, in 8 bits
        losses += 6 * model.vocab_size * model.dim / card.memory_bandwidth
    again = model.num_trunk_layers * forward if config.train.activation_checkpointing else 0.0
    compute = 3 * (model.num_trunk_layers * forward + sum(heads)) + losses + again

    network = Network(dataclasses.replace(config.cluster, emulate=world_size))
    layer, vocabulary = 2 * layer_parameters(model), 2 * model.vocab_size * model.dim
    sizes = [2 * head_parameters(model, index) for index in range(model.num_future_tokens)]
    sent = _widening(config)
    gather, reduction = network.seconds("all_gather", layer), network.seconds("reduce_scatter", sent * layer)
    head_gathers = [network.seconds("all_gather", size) for size in sizes]
    head_reductions = [network.seconds("reduce_scatter", sent * size) for size in sizes]
    outer = network.seconds("all_gather", vocabulary) + network.seconds("reduce_scatter", sent * vocabulary)
    ends = outer + gather + reduction  # embedding and first layer: nothing runs before them, or after
    between = (model.num_trunk_layers - 1) * max(0.0, gather - forward)
    between += (model.num_trunk_layers - 1) * max(0.0, gather + reduction - 2 * forward)
    for head_gather, head_reduction, head in zip(head_gathers, head_reductions, heads, strict=True):
        between += max(0.0, head_gather + head_reduction - 2 * head)
    transfers = (2 * gather + reduction) * model.num_trunk_layers + 2 * sum(head_gathers) + sum(head_reductions)
    communicating = min(1.0, transfers / compute)
    taken = compute * communicating * config.cluster.communication_sms / card.multiprocessors if world_size > 1 else 0.0
    return compute, ends + between + taken


def _state_bytes(config: Config) -> int:
    """Of a parameter's fp32 weight and optimizer state."""
    return optimizer_kind(config.optimizer).state_bytes()


def _widening(config: Config) -> int:
    """Bytes of a gradient on its way to other ranks, over those of the weight in 16 bits."""
    return 2 if config.engine.reduce_dtype == "fp32" else 1


def _float8_heads(config: Config) -> int:
    return sum(config.head_loss.in_float8(index) for index in range(config.model.num_future_tokens))


def fitting(config: Config, world_size: int, card: Card) -> tuple[str, Config, int] | None:
    """The nearest changes that fit, in words, with the configuration and number of ranks they lead to; None if none
    does.
    """
    for words, changed, ranks in _alternatives(config, world_size):
        try:
            if plan(changed, ranks, card).peak_bytes <= card.memory_bytes:
                return words, changed, ranks
        except InputError:  # a batch that does not divide among so many ranks: not an alternative
            continue
    return None


def _alternatives(config: Config, world_size: int) -> Iterator[tuple[str, Config, int]]:
    """From what costs nothing to what costs more cards."""
    smaller = config.train.micro_batch_size
    while smaller > 1:
        smaller = max(1, smaller // 2)
        yield f"train.micro_batch_size={smaller}", _with_train(config, micro_batch_size=smaller), world_size
    recomputing = _with_train(config, micro_batch_size=1, activation_checkpointing=True)
    words = "train.micro_batch_size=1 train.activation_checkpointing=true"
    yield words, recomputing, world_size
    num_stages = config.engine.num_stages or 0
    while (
        config.engine.kind == "pipeline"
        and not config.engine.stage_layers
        and 2 * num_stages <= config.model.num_layers
    ):
        num_stages *= 2
        engine = dataclasses.replace(config.engine, num_stages=num_stages)
        yield f"{words} engine.num_stages={num_stages}", dataclasses.replace(recomputing, engine=engine), world_size
    if config.engine.kind != "pipeline":
        offloading = dataclasses.replace(recomputing, engine=dataclasses.replace(config.engine, offload_optimizer=True))
        yield f"{words} engine.offload_optimizer=true", offloading, world_size
    ranks = world_size
    while ranks < 8192:
        ranks *= 2
        yield f"--gpus {ranks} {words}", recomputing, ranks


def _with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
