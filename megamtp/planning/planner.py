"""Predicts the memory of a rank, by kind, and the time of an optimizer step of a configuration on a cluster.

Sources: bytes from what the engines allocate (engines/deepspeed/gather.py and reduction.py, stage_memory.py,
losses/linear_cross_entropy.py); rates, and what a layer saves for its backward pass, from the steps in tools/results,
which tests compare the predictions with.
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
    layer_cost,
    num_head_parameters,
    num_layer_parameters,
    num_parameters,
    num_unembedding_parameters,
)
from megamtp.model.layers import LayerCost
from megamtp.optimizers.kinds import optimizer_kind
from megamtp.planning.links import Link
from megamtp.planning.partition import Partition, data_parallel_rank_and_size, whole_loss_partition
from megamtp.planning.pass_costs import PassCosts
from megamtp.planning.spread import SpreadPartition, spread_layers, spread_loss_partition
from megamtp.planning.stage_memory import OPTIMIZER, chunk_bytes

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class Gpu:
    """A GPU as measured in bf16.

    Attributes:
        memory_bytes: bytes that one process can allocate.
        matrix_flops: FLOP/s of large matrix products.
        attention_flops: FLOP/s of attention; causal products count half.
        memory_bandwidth: bytes/s.
        float8_speedup: FLOP/s of the loss's fp8 products divided by the FLOP/s of the same products in bf16.
    """

    memory_bytes: float
    matrix_flops: float
    attention_flops: float
    memory_bandwidth: float
    multiprocessors: int
    float8_speedup: float


# Rates and bytes are fitted to the "plain" steps of tools/results/overhead*.json on both GPUs (2026-11-28 and -29). The
# GPUs have the same FLOP/s and differ in memory bandwidth.
GPUS = {"h100": Gpu(79e9, 712e12, 246e12, 2.8e12, 132, 1.8), "h200": Gpu(140e9, 712e12, 246e12, 4.0e12, 132, 1.8)}
# Bytes that a layer's norms, rotation, activation and sums read and write per element of the residual stream, forward
# and backward.
ELEMENT_BYTES = 102


@dataclass(frozen=True)
class Plan:
    """Predicted bytes of one rank at its peak, by kind, and seconds of one optimizer step.

    Attributes:
        memory: on the GPU, by kind; in a pipeline, of the stage that needs the most.
        host_memory: on the CPU, by kind, without the process itself; in a pipeline, of the stage with most parameters.
        checkpoint_bytes: on disk, of all ranks.
        compute_seconds: forward and backward passes of all micro-batches, without communication; in a pipeline, the
            mean over the stages.
        exposed_seconds: communication that no computation hides, and the time by which communication slows computation
            down; in a pipeline, also the time that stages wait.
        optimizer_seconds: None if the optimizer runs on the CPU, whose speed is not known.
        partition: of a pipeline.
    """

    memory: Mapping[str, float]
    host_memory: Mapping[str, float]
    checkpoint_bytes: int
    num_micro_batches: int
    compute_seconds: float
    exposed_seconds: float
    optimizer_seconds: float | None
    partition: Partition | SpreadPartition | None = None

    @property
    def peak_bytes(self) -> float:
        """The bytes on the GPU, of all kinds."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """The time of a step; without the optimizer if it runs on the CPU."""
        return self.compute_seconds + self.exposed_seconds + (self.optimizer_seconds or 0.0)


def plan(config: Config, world_size: int, gpu: Gpu) -> Plan:
    """Returns the plan for ZeRO-3 with grouped communication, or for a pipeline, in bf16 with sequential heads.

    Raises:
        InputError: another engine, precision or head schedule, or a batch that does not divide among the ranks.
    """
    engine = config.engine
    settings = (
        f"engine.kind={engine.kind}, engine.communication={engine.communication}, "
        f"train.precision={config.train.precision}"
    )
    if settings == "engine.kind=pipeline, engine.communication=grouped, train.precision=bf16":
        return _plan_pipeline(config, world_size, gpu)
    if settings != "engine.kind=zero3, engine.communication=grouped, train.precision=bf16":
        raise InputError(f"{settings}: not measured, so not planned; expected zero3 or pipeline, grouped and bf16")
    if engine.head_schedule != "sequential":
        raise InputError(
            f"engine.head_schedule={engine.head_schedule}: not measured, so not planned; expected sequential"
        )
    num_micro_batches = config.num_micro_batches(world_size)
    compute, exposed = _micro_batch_seconds(config, world_size, gpu)
    share = num_parameters(config.model) / world_size
    return Plan(
        _memory(config, world_size),
        _host_memory(config, share),
        _checkpoint_bytes(config),
        num_micro_batches,
        num_micro_batches * compute,
        num_micro_batches * exposed,
        None if engine.offload_optimizer else _optimizer_seconds(share, gpu),
    )


def _optimizer_seconds(num_parameters: float, gpu: Gpu) -> float:
    return 30 * num_parameters / gpu.memory_bandwidth  # 16 bytes read, 14 written


def _plan_pipeline(config: Config, world_size: int, gpu: Gpu) -> Plan:
    """Plans a pipeline with the partition that is fastest on this GPU, and the reduction over pipelines after it.

    Where losses are spread, rows and orders are those that a run derives from the partition's layers.
    """
    _, num_pipelines = data_parallel_rank_and_size(config, 0, world_size)
    cluster, engine, costs = config.cluster, config.engine, _pass_costs(config, gpu)
    link = Link(cluster.flat_bandwidth or cluster.network_bandwidth, cluster.latency)
    transfer_times = link.transfer_times(config)
    partition: Partition | SpreadPartition
    if engine.spread_losses:
        with_layers = dataclasses.replace(engine, stage_layers=spread_layers(config, costs))
        partition = spread_loss_partition(dataclasses.replace(config, engine=with_layers), num_pipelines)
        partition = partition.with_costs(config, costs, transfer_times)
    else:
        partition = whole_loss_partition(config, num_pipelines, costs)
    num_micro_batches = config.num_micro_batches(num_pipelines)
    compute = num_micro_batches * sum(partition.costs) / len(partition.costs)
    largest = max(partition.stages, key=lambda stage: sum(stage.memory_bytes.values()))
    weights = max(stage.memory_bytes["weights"] for stage in partition.stages)
    network = Network(dataclasses.replace(cluster, emulate=num_pipelines))
    # DeepSpeed's pipeline all-reduces whole gradients, although each pipeline keeps only a shard of the sums.
    reduction = network.seconds("all_reduce", weights * _gradient_scale(config))
    reduction += network.seconds("all_gather", weights)
    share = max(stage.memory_bytes[OPTIMIZER] for stage in partition.stages) / _state_bytes(config)
    return Plan(
        largest.memory_bytes,
        _host_memory(config, share),
        _checkpoint_bytes(config),
        num_micro_batches,
        compute,
        partition.step_time(transfer_times) - compute + reduction,
        _optimizer_seconds(weights / 2 / num_pipelines, gpu),
        partition,
    )


def _pass_costs(config: Config, gpu: Gpu) -> PassCosts:
    """Returns costs in seconds."""
    model, n = config.model, config.model.num_future_tokens
    adding = 10 / gpu.memory_bandwidth  # bytes to add a gradient to its fp32 sum, read and written
    forward, product = _layer_seconds(config, gpu), 2 * _tokens(config) * model.dim / gpu.matrix_flops
    heads = _head_seconds(config, gpu)
    saved = _num_float8_heads(config) / n * (1 - 1 / gpu.float8_speedup)  # share of a product that fp8 heads save
    return PassCosts(
        layer_forward=forward,
        layer_backward=2 * forward + adding * num_layer_parameters(model),
        head_forward=tuple(heads),
        head_backward=tuple(2 * head + adding * num_head_parameters(model, index) for index, head in enumerate(heads)),
        loss=model.vocab_size * product * (3 - 2 * saved),
        unembedding_copy=adding * num_unembedding_parameters(model),
        embedding=adding * model.vocab_size * model.dim,
        slice_statistics=product * (1 - saved),
        slice_gradients=product * (2 - saved),
    )


def _layer_seconds(config: Config, gpu: Gpu) -> float:
    """Returns the time of one trunk layer's forward pass of one micro-batch."""
    return _tokens(config) * _seconds_per_token(layer_cost(config.model, config.train.sequence_length), gpu)


def _head_seconds(config: Config, gpu: Gpu) -> list[float]:
    """Returns the time of each head's forward pass of one micro-batch, without its loss."""
    costs = [
        head_cost(config.model, index, config.train.sequence_length) for index in range(config.model.num_future_tokens)
    ]
    return [_tokens(config) * _seconds_per_token(cost, gpu) for cost in costs]


def _tokens(config: Config) -> int:
    """Returns the number of tokens of one micro-batch."""
    return config.train.micro_batch_size * config.train.sequence_length


def _seconds_per_token(cost: LayerCost, gpu: Gpu) -> float:
    return (
        cost.matrix_flops / gpu.matrix_flops
        + cost.attention_flops / gpu.attention_flops
        + cost.streamed_elements * ELEMENT_BYTES / 3 / gpu.memory_bandwidth
    )


def _memory(config: Config, world_size: int) -> dict[str, float]:
    model, tokens = config.model, _tokens(config)
    share = num_parameters(model) / world_size
    layer, vocabulary = 2 * num_layer_parameters(model), 2 * model.vocab_size * model.dim
    largest = max(layer, *(2 * num_head_parameters(model, index) for index in range(model.num_future_tokens)))
    saved_by_layer = 2 * tokens * layer_cost(model, config.train.sequence_length).kept_elements
    costs = [head_cost(model, index, config.train.sequence_length) for index in range(model.num_future_tokens)]
    saved_by_head = 2 * tokens * max(cost.kept_elements for cost in costs)
    boundaries = 2 * tokens * model.dim * model.num_trunk_layers
    chunk = chunk_bytes(config, logit_bytes=2)
    # dW in fp32 and in the dtype of the reduction, and a chunk of logits. In fp8 also two copies of the weight, one of
    # the hidden states, and one of the chunk's gradient.
    head_loss = (2 + _gradient_scale(config)) * vocabulary + chunk
    head_loss += vocabulary + tokens * model.dim + chunk // 2 if _num_float8_heads(config) else 0
    on_device, gathers = 0 if config.engine.offload_optimizer else 1, world_size > 1 or config.engine.offload_parameters
    return {
        "weights": 0 if config.engine.offload_parameters else 2 * share,
        "gradients": 4 * share * on_device,
        "optimizer": _state_bytes(config) * share * on_device,
        "gathered weights": (1 + config.engine.prefetch_modules) * largest + 2 * vocabulary if gathers else 0,
        "gradients in flight": _gradient_scale(config) * largest,
        "activations": boundaries + max(saved_by_layer, saved_by_head)
        if config.train.activation_checkpointing
        else model.num_trunk_layers * saved_by_layer + saved_by_head,
        "backward pass of one layer": 13 * tokens * model.hidden_dim,
        "head loss": head_loss,
    }


def _host_memory(config: Config, share: float) -> dict[str, float]:
    """Returns CPU bytes by kind. `share`: parameters whose optimizer state the rank keeps, on the GPU or the CPU."""
    engine = config.engine
    return {
        "copy for the checkpoint": _state_bytes(config) * share,
        "offloaded gradients and optimizer": (4 + _state_bytes(config)) * share * engine.offload_optimizer,
        "offloaded weights": 2 * share * engine.offload_parameters,
    }


def _checkpoint_bytes(config: Config) -> int:
    return _state_bytes(config) * num_parameters(config.model)


def _micro_batch_seconds(config: Config, world_size: int, gpu: Gpu) -> tuple[float, float]:
    """Returns the (compute, exposed communication) time of one micro-batch's forward and backward pass."""
    model = config.model
    forward, heads = _layer_seconds(config, gpu), _head_seconds(config, gpu)
    product = 2 * _tokens(config) * model.vocab_size * model.dim / gpu.matrix_flops
    num_float8_heads = _num_float8_heads(config)
    losses = 3 * product * model.num_future_tokens - 2 * product * num_float8_heads * (1 - 1 / gpu.float8_speedup)
    if num_float8_heads:  # reads the weight to find its largest element, and to write two copies in 8 bits
        losses += 6 * model.vocab_size * model.dim / gpu.memory_bandwidth
    recomputation = model.num_trunk_layers * forward if config.train.activation_checkpointing else 0.0
    compute = 3 * (model.num_trunk_layers * forward + sum(heads)) + losses + recomputation

    network = Network(dataclasses.replace(config.cluster, emulate=world_size))
    layer, vocabulary = 2 * num_layer_parameters(model), 2 * model.vocab_size * model.dim
    sizes = [2 * num_head_parameters(model, index) for index in range(model.num_future_tokens)]
    scale = _gradient_scale(config)
    gather, reduction = network.seconds("all_gather", layer), network.seconds("reduce_scatter", scale * layer)
    head_gathers = [network.seconds("all_gather", size) for size in sizes]
    head_reductions = [network.seconds("reduce_scatter", scale * size) for size in sizes]
    embedding = network.seconds("all_gather", vocabulary) + network.seconds("reduce_scatter", scale * vocabulary)
    # Nothing runs before the first gathers or after the last reductions, which are those of the embedding and a layer.
    at_ends = embedding + gather + reduction
    between_layers = (model.num_trunk_layers - 1) * max(0.0, gather - forward)
    between_layers += (model.num_trunk_layers - 1) * max(0.0, gather + reduction - 2 * forward)
    for head_gather, head_reduction, head in zip(head_gathers, head_reductions, heads, strict=True):
        between_layers += max(0.0, head_gather + head_reduction - 2 * head)
    transfers = (2 * gather + reduction) * model.num_trunk_layers + 2 * sum(head_gathers) + sum(head_reductions)
    slowed = compute * min(1.0, transfers / compute)  # time of computation while transfers occupy multiprocessors
    slowdown = slowed * config.cluster.communication_sms / gpu.multiprocessors if world_size > 1 else 0.0
    return compute, at_ends + between_layers + slowdown


def _state_bytes(config: Config) -> int:
    """Returns the bytes of one parameter's fp32 weight and optimizer state."""
    return optimizer_kind(config.optimizer).state_bytes()


def _gradient_scale(config: Config) -> int:
    """Returns the bytes of a gradient in a reduction, divided by the bytes of its weight in 16 bits."""
    return 2 if config.engine.reduce_dtype == "fp32" else 1


def _num_float8_heads(config: Config) -> int:
    return sum(config.resolved_head_loss.in_float8(index) for index in range(config.model.num_future_tokens))


def nearest_fitting(config: Config, world_size: int, gpu: Gpu) -> tuple[str, Config, int] | None:
    """Returns the nearest alternative that fits, as (settings, configuration, number of ranks), or None."""
    for settings, changed, num_ranks in _alternatives(config, world_size):
        try:
            if plan(changed, num_ranks, gpu).peak_bytes <= gpu.memory_bytes:
                return settings, changed, num_ranks
        except InputError:  # the batch does not divide among so many ranks: not an alternative
            continue
    return None


def _alternatives(config: Config, world_size: int) -> Iterator[tuple[str, Config, int]]:
    """Yields alternatives from the cheapest, smaller micro-batches, to the most expensive, more GPUs."""
    smaller = config.train.micro_batch_size
    while smaller > 1:
        smaller = max(1, smaller // 2)
        yield f"train.micro_batch_size={smaller}", _with_train(config, micro_batch_size=smaller), world_size
    recomputing = _with_train(config, micro_batch_size=1, activation_checkpointing=True)
    settings = "train.micro_batch_size=1 train.activation_checkpointing=true"
    yield settings, recomputing, world_size
    num_stages = config.engine.num_stages or 0
    while (
        config.engine.kind == "pipeline"
        and not config.engine.stage_layers
        and 2 * num_stages <= config.model.num_layers
    ):
        num_stages *= 2
        engine = dataclasses.replace(config.engine, num_stages=num_stages)
        yield f"{settings} engine.num_stages={num_stages}", dataclasses.replace(recomputing, engine=engine), world_size
    if config.engine.kind != "pipeline":
        offloading = dataclasses.replace(recomputing, engine=dataclasses.replace(config.engine, offload_optimizer=True))
        yield f"{settings} engine.offload_optimizer=true", offloading, world_size
    num_ranks = world_size
    while num_ranks < 8192:
        num_ranks *= 2
        yield f"--gpus {num_ranks} {settings}", recomputing, num_ranks


def _with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
