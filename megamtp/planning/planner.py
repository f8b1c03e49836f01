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
from megamtp.model.cost import num_parameters
from megamtp.planning.gpus import LAYER_RATES, Gpu
from megamtp.planning.links import Link
from megamtp.planning.memory import checkpoint_bytes, gradient_scale, host_memory, state_bytes, zero_memory
from megamtp.planning.partition import Partition, data_parallel_rank_and_size, whole_loss_partition
from megamtp.planning.pass_seconds import micro_batch_seconds, pass_seconds
from megamtp.planning.spread import SpreadPartition, spread_layers, spread_loss_partition
from megamtp.planning.stage_memory import OPTIMIZER

SECONDS_PER_DAY = 86400.0


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
    """Returns the plan for ZeRO-3 with grouped communication and sequential heads, or for a pipeline; in bf16 or fp8.

    Raises:
        InputError: another engine, precision or head schedule, or a batch that does not divide among the ranks.
    """
    engine = config.engine
    settings = (
        f"engine.kind={engine.kind}, engine.communication={engine.communication}, "
        f"train.precision={config.train.precision}"
    )
    is_measured = engine.kind in ("zero3", "pipeline") and engine.communication == "grouped"
    if not is_measured or config.train.precision not in LAYER_RATES:
        raise InputError(
            f"{settings}: not measured, so not planned; expected zero3 or pipeline, grouped, and bf16 or fp8"
        )
    if engine.kind == "pipeline":
        return _plan_pipeline(config, world_size, gpu)
    if engine.head_schedule != "sequential":
        raise InputError(
            f"engine.head_schedule={engine.head_schedule}: not measured, so not planned; expected sequential"
        )
    num_micro_batches = config.num_micro_batches(world_size)
    compute, exposed = micro_batch_seconds(config, world_size, gpu)
    share = num_parameters(config.model) / world_size
    return Plan(
        zero_memory(config, world_size),
        host_memory(config, share),
        checkpoint_bytes(config),
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
    cluster, engine, costs = config.cluster, config.engine, pass_seconds(config, gpu)
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
    # in 16 bits: neither the copies in fp8 nor fp32 sums are sent
    weights = max(stage.memory_bytes["gradients"] for stage in partition.stages) // 2
    network = Network(dataclasses.replace(cluster, emulate=num_pipelines))
    # DeepSpeed's pipeline all-reduces whole gradients, although each pipeline keeps only a shard of the sums.
    reduction = network.seconds("all_reduce", weights * gradient_scale(config))
    reduction += network.seconds("all_gather", weights)
    share = max(stage.memory_bytes[OPTIMIZER] for stage in partition.stages) / state_bytes(config)
    return Plan(
        largest.memory_bytes,
        host_memory(config, share),
        checkpoint_bytes(config),
        num_micro_batches,
        compute,
        partition.step_time(transfer_times) - compute + reduction,
        _optimizer_seconds(weights / 2 / num_pipelines, gpu),
        partition,
    )


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
        and 2 * num_stages <= config.model.num_layers_and_heads
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
