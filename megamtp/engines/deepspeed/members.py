"""The members of DeepSpeed's objects that this package uses, as Protocols that give them types.

DeepSpeed has no usable type hints, and documents few of these members. Checked against DeepSpeed 0.19.

Tests: tests/distributed/test_members.py.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class TrainedParameter(Protocol):
    """A parameter under any optimizer. Source: deepspeed/runtime/zero/stage3.py, stage_1_and_2.py."""

    grad: Tensor | None  # torch's
    ds_grad_is_ready: bool  # set by megamtp; False keeps the gradient out of the reduction buckets


class ShardedParameter(TrainedParameter, Protocol):
    """A parameter under ZeRO-3.

    Source: deepspeed/runtime/zero/partition_parameters.py, Init._convert_to_deepspeed_param.
    """

    data: Tensor  # this and the next two are torch's
    dtype: torch.dtype

    def register_post_accumulate_grad_hook(self, hook: "Callable[[ShardedParameter], None]") -> RemovableHandle: ...

    ds_id: int  # in the order of construction
    ds_shape: torch.Size  # shape of the whole parameter
    ds_numel: int  # number of elements of the whole parameter
    ds_tensor: Tensor  # this rank's shard, flat and padded
    ds_status: ZeroParamStatus  # whether the whole parameter is available
    ds_persist: bool  # whether it stays whole on all ranks between its uses in a step
    ds_process_group: dist.ProcessGroup  # the ranks among which it is sharded
    ds_active_sub_modules: set[int]  # ids of the modules that use it now; DeepSpeed releases it when the set is empty

    def all_gather(self, param_list: "list[ShardedParameter]") -> object: ...  # makes them whole; collective

    def partition(self) -> None: ...  # frees the whole parameter and keeps the shard


class FragmentAddress(Protocol):
    """Elements start, start + 1, ... of a flat tensor. Source: deepspeed/utils/tensor_fragment.py, fragment_address."""

    start: int
    numel: int


class FragmentMapping(Protocol):
    """The location of this rank's piece of a parameter. Source: deepspeed/utils/tensor_fragment.py, tensor_fragment."""

    lp_fragment_address: FragmentAddress  # in the flattened parameter
    hp_fragment_address: FragmentAddress  # in the flat fp32 weights of a parameter group
    param_group_index: int  # the parameter group


class UnshardedParameter(TrainedParameter, Protocol):
    """A parameter under ZeRO-1 or BF16_Optimizer, which shard only the optimizer's state."""

    # set by megamtp; True excludes a copy from the gradient norm. Source: deepspeed/runtime/utils.py
    ds_pipe_replicated: bool
    # None if no piece is on this rank. Source: deepspeed/utils/mixed_precision_linkage.py
    _hp_mapping: FragmentMapping | None
    # BF16_Optimizer's fp32 sum of gradients. Source: deepspeed/runtime/bf16_optimizer.py
    _hp_grad: Tensor


class CommonOptimizer(Protocol):
    """Members of all DeepSpeed optimizers. Source: deepspeed/runtime/base_optimizer.py, ZeROOptimizer."""

    optimizer: torch.optim.Optimizer  # its parameters are the flat fp32 weights
    param_groups: list[dict[str, Any]]  # torch's

    # multiplies by the loss scale if the tensor has a grad_fn
    def scale_if_loss(self, value: Tensor) -> Tensor: ...

    # also discards BF16_Optimizer's fp32 sums and resets ZeRO-3's count of micro-batches
    def zero_grad(self) -> None: ...


class LossScaler(Protocol):
    """The loss scale under fp16, and its counters. Source: deepspeed/runtime/fp16/loss_scaler.py, DynamicLossScaler."""

    cur_scale: float
    cur_iter: int
    last_overflow_iter: int
    cur_hysteresis: int


class Zero1Bucket(Protocol):
    """Gradients that wait for their reduction. Source: deepspeed/runtime/zero/stage_1_and_2.py, IPGBucket."""

    def clear(self) -> None: ...


class Zero1Optimizer(CommonOptimizer, Protocol):
    """The optimizer of ZeRO-1 in fp32 and fp16.

    Source: deepspeed/runtime/zero/stage_1_and_2.py, DeepSpeedZeroOptimizer.
    """

    loss_scaler: LossScaler  # under fp16; otherwise a constant scaler
    single_partition_of_fp32_groups: list[Tensor]  # this rank's flat fp32 weights of each parameter group
    ipg_buckets: dict[torch.dtype, Zero1Bucket]
    # a parameter that is larger than a bucket and waits for its reduction
    extra_large_param_to_reduce: dict[torch.dtype, Tensor]
    params_already_reduced: list[bool]  # in the current backward pass
    all_grad_tensors: dict[int, list[Tensor]]  # by parameter group: sums over the previous micro-batches
    averaged_gradients: dict[int, list[Tensor] | None]  # by parameter group: reduced gradients
    grads_in_partition: Tensor | None  # memory for the reduced gradients of this rank's partition
    grads_in_partition_offset: int  # number of elements of it in use

    def update_lp_params(self) -> None: ...  # copies the fp32 weights to the model's weights; collective


class Bf16Optimizer(CommonOptimizer, Protocol):
    """The optimizer of ZeRO-1 in bf16, with fp32 sums of gradients.

    Source: deepspeed/runtime/bf16_optimizer.py, BF16_Optimizer.
    """

    fp32_groups_flat_partition: list[Tensor]  # this rank's flat fp32 weights of each parameter group
    fp32_groups_gradients: list[list[Tensor]]  # by parameter group and parameter: the fp32 sum
    fp32_groups_has_gradients: list[list[bool]]  # whether a gradient was added to it
    # adds a gradient to its sum: (..., group, parameter, whether to set the gradient to zero)
    _update_hp_grad: Callable[[UnshardedParameter, int, int, bool], None]

    def clear_lp_grads(self) -> None: ...  # sets the bf16 gradients to zero

    def update_hp_grads(self, clear_lp_grads: bool) -> None: ...  # adds all of them to the fp32 sums

    def update_lp_params(self) -> None: ...  # copies the fp32 weights to the model's weights; collective


class ReplaceableCoordinator(Protocol):
    """The members of the parameter coordinator that DeepSpeed still uses when its hooks are removed.

    Source: deepspeed/runtime/zero/stage3.py, parameter_offload.py; partitioned_param_coordinator.py,
    PartitionedParameterCoordinator.
    """

    hierarchy: int  # nesting depth of its log messages
    is_complete_trace: Callable[[], bool]  # whether the order of fetches is recorded completely

    def release_backward_leftovers(self) -> None: ...  # called at the end of a backward pass

    def release_and_reset_all(self, module: nn.Module) -> None: ...  # releases all parameters, also persistent ones


class ParameterCoordinator(ReplaceableCoordinator, Protocol):
    """Fetches and releases parameters. Source: deepspeed/runtime/zero/partitioned_param_coordinator.py."""

    # releases the parameters that no active module uses
    def release_sub_module(self, submodule: nn.Module, forward: bool) -> None: ...

    def reset_step(self) -> None: ...  # called at the end of a pass: its order of fetches is complete


class Zero3Offload(Protocol):
    """ZeRO-3's hooks on modules. Source: deepspeed/runtime/zero/parameter_offload.py, DeepSpeedZeRoOffload."""

    param_coordinator: ReplaceableCoordinator  # called by the hooks; the next four are arguments of its constructor
    _prefetch_bucket_sz: int
    _max_reuse_distance_in_numel: int
    _max_available_parameters_in_numel: int
    _DeepSpeedZeRoOffload__allgather_stream: torch.cuda.Stream | None

    def get_param_coordinator(self) -> ParameterCoordinator: ...  # param_coordinator, if it is DeepSpeed's own

    def setup_zero_stage3_hooks(self) -> None: ...  # registers hooks on all modules

    def _remove_module_hooks(self) -> None: ...


class OffloadedModule(Protocol):
    """The model under ZeRO-3. Source: deepspeed/runtime/zero/parameter_offload.py, DeepSpeedZeRoOffload."""

    ds_inflight_param_registry: object  # parameters in flight, an argument of the coordinator's constructor


class Zero3Bucket(Protocol):
    """Gradients that wait for their reduction. Source: deepspeed/runtime/zero/stage3.py, IPGBucketZ3."""

    def clear_params(self) -> None: ...  # keeps the bucket's memory


class Zero3Optimizer(CommonOptimizer, Protocol):
    """The optimizer of ZeRO-3. Source: deepspeed/runtime/zero/stage3.py, DeepSpeedZeroOptimizer_Stage3."""

    parameter_offload: Zero3Offload
    loss_scaler: LossScaler  # under fp16; otherwise a constant scaler
    dp_process_group: dist.ProcessGroup  # the ranks among which parameters are sharded
    communication_data_type: torch.dtype  # of gradients
    offload_optimizer: bool  # whether its state and the sums of gradients are in CPU memory
    micro_step_id: int  # index of the micro-batch in its step, from 0
    fp16_groups: list[list[ShardedParameter]]  # by sub-group
    sub_group_to_group_id: dict[int, int]  # the parameter group of each sub-group
    fp32_partitioned_groups_flat: list[Tensor]  # this rank's flat fp32 weights of each sub-group
    # by get_param_id: a parameter's sub-group, its offset there, and its number of elements with padding
    grad_position: dict[int, tuple[int, int, int]]
    ipg_buckets: dict[torch.dtype, Zero3Bucket]
    reduce_and_partition_stream: torch.cuda.Stream | None  # None on a CPU
    independent_gradient_partition_epilogue: Callable[[], None]  # called at the end of every backward pass
    # hooks on parameters, and in _leaf_module_hooks on modules, that put gradients into buckets
    _grad_acc_hooks: list[RemovableHandle]
    _leaf_module_hooks: list[RemovableHandle]
    # by ds_id: this rank's shard of the sum of gradients, padded
    _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition: dict[int, Tensor]

    def get_param_id(self, param: ShardedParameter) -> int: ...

    # adds shards of gradients to the sums
    def partition_grads(self, params_to_release: list[ShardedParameter], grad_partitions: list[Tensor]) -> None: ...

    def create_reduce_and_remove_grad_hooks(self) -> None: ...

    # called before a change of the fp32 weights: releases all whole parameters
    def checkpoint_event_prologue(self) -> None: ...

    def checkpoint_event_epilogue(self) -> None: ...  # called after it: gathers persistent parameters; collective

    # copies the fp32 weights to the shards
    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None: ...


DeepSpeedOptimizer = Zero1Optimizer | Bf16Optimizer | Zero3Optimizer


class DeepSpeedEngine(Protocol):
    """The engine that deepspeed.initialize returns. Source: deepspeed/runtime/engine.py, DeepSpeedEngine."""

    module: nn.Module
    optimizer: DeepSpeedOptimizer
    device: torch.device
    global_steps: int  # this and the next two are COUNTERS of checkpoint/state.py
    global_samples: int
    skipped_steps: int
    _take_model_step: Callable[[dict[str, Any] | None], None]  # runs the optimizer, in the last `step` of a step

    def __call__(self, *inputs: Any) -> Any: ...  # the model's forward pass

    def backward(self, loss: Tensor) -> Tensor: ...

    def step(self) -> None: ...  # ends a micro-batch; after the last one, runs the optimizer

    def train(self) -> nn.Module: ...

    def eval(self) -> nn.Module: ...

    def gradient_accumulation_steps(self) -> int: ...

    def is_gradient_accumulation_boundary(self) -> bool: ...  # whether the micro-batch is the last one of its step

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def get_global_grad_norm(self) -> float | Tensor: ...  # of the last step, before clipping

    def was_step_applied(self) -> bool: ...  # False: the gradient was not finite


class DeepSpeedPipelineEngine(DeepSpeedEngine, Protocol):
    """The engine for pipelines. Source: deepspeed/runtime/pipe/engine.py, PipelineEngine."""

    micro_batches: int  # number of micro-batches in a step
    total_loss: Tensor | None  # the loss that it reports for a step, on the last stage
    _running_engine_backward: bool  # gradients are refused where it is False. Source: deepspeed/runtime/engine.py
    _INSTRUCTION_MAP: dict[type[schedule.PipeInstruction], Callable[..., None]]  # functions that run the instructions
    _train_schedule: Callable[[], schedule.PipeSchedule]  # returns this stage's schedule of a step
    _inference_schedule: Callable[[int], schedule.PipeSchedule]  # the same for n micro-batches' forward passes

    def train_batch(self, data_iter: Iterator[Any]) -> object: ...

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        compute_loss: bool,
        reduce_output: str | None,
        bcast_loss: bool,
        num_micro_batches: int,
    ) -> object: ...

    def is_last_stage(self) -> bool: ...


class StageGrid(Protocol):
    """The positions of ranks in pipelines. Source: deepspeed/runtime/pipe/topology.py, PipelineParallelGrid."""

    def get_stage_id(self) -> int: ...

    def get_data_parallel_world_size(self) -> int: ...  # number of pipelines

    def stage_to_global(self, stage_id: int, data: int) -> int: ...  # the rank of a stage of pipeline `data`


class StageModule(Protocol):
    """The module of a pipeline on one rank. Source: deepspeed/runtime/pipe/module.py, PipelineModule."""

    parts: list[int]  # the first layers of all stages, and the end
    _grid: StageGrid

    # sets `parts` and the bounds of this stage; overridden by DeepSpeedStageModule
    def _partition_layers(self, method: str) -> None: ...

    def _set_bounds(self, start: int, stop: int) -> None: ...  # this stage has the layers start, ..., stop - 1

    def _build(self) -> None: ...  # builds this stage's layers; overridden by DeepSpeedStageModule


def trained(parameters: Iterable[nn.Parameter]) -> list[TrainedParameter]:
    """Casts the parameters of a model under any DeepSpeed optimizer."""
    return cast("list[TrainedParameter]", list(parameters))


def sharded(parameters: Iterable[nn.Parameter]) -> list[ShardedParameter]:
    """Casts the parameters of a model under ZeRO-3."""
    return cast("list[ShardedParameter]", list(parameters))


def unsharded(parameters: Iterable[nn.Parameter]) -> list[UnshardedParameter]:
    """Casts the parameters of a model under ZeRO-1 or BF16_Optimizer."""
    return cast("list[UnshardedParameter]", list(parameters))


def is_zero3(optimizer: DeepSpeedOptimizer) -> "TypeIs[Zero3Optimizer]":
    """Returns whether the model's parameters are ShardedParameters."""
    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)


def is_bf16(optimizer: DeepSpeedOptimizer) -> "TypeIs[Bf16Optimizer]":
    """Returns whether the optimizer sums bf16 gradients in fp32."""
    return isinstance(optimizer, BF16_Optimizer)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Returns the shape of the full parameter, also if this rank holds only a shard or some rows of it."""
    return tuple(getattr(parameter, "ds_shape", getattr(parameter, "full_shape", parameter.shape)))
