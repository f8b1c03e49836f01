"""The members of DeepSpeed's objects that this package uses, each named once: Protocols by which the other files are
typed.

DeepSpeed has no type hints that a checker could use, and few of these members are in its documentation. A test looks
for all of them on live objects. Checked against DeepSpeed 0.19.

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
    ds_grad_is_ready: bool  # set here; False keeps a gradient out of the reduction buckets


class ShardedParameter(TrainedParameter, Protocol):
    """A parameter under ZeRO-3. Source: deepspeed/runtime/zero/partition_parameters.py,
    Init._convert_to_deepspeed_param.
    """

    data: Tensor  # this and the next two are torch's
    dtype: torch.dtype

    def register_post_accumulate_grad_hook(self, hook: "Callable[[ShardedParameter], None]") -> RemovableHandle: ...

    ds_id: int  # in the order of construction
    ds_shape: torch.Size  # of the whole parameter, as is ds_numel
    ds_numel: int
    ds_tensor: Tensor  # this rank's shard, flat and padded
    ds_status: ZeroParamStatus  # whether the whole parameter is there
    ds_persist: bool  # it stays whole on all ranks between a step's uses
    ds_process_group: dist.ProcessGroup  # the ranks that share it
    ds_active_sub_modules: set[int]  # numbers of the modules that use it now; DeepSpeed releases it when there are none

    def all_gather(self, param_list: "list[ShardedParameter]") -> object: ...  # makes them whole; collective

    def partition(self) -> None: ...  # lets the whole parameter go and keeps the shard


class FragmentAddress(Protocol):
    """Elements start, start + 1, ... of a flat tensor. Source: deepspeed/utils/tensor_fragment.py, fragment_address."""

    start: int
    numel: int


class FragmentMapping(Protocol):
    """Where this rank's part of a parameter is. Source: deepspeed/utils/tensor_fragment.py, tensor_fragment."""

    lp_fragment_address: FragmentAddress  # in the parameter, flat
    hp_fragment_address: FragmentAddress  # in the flat fp32 weights of a parameter group
    param_group_index: int  # of this group


class UnshardedParameter(TrainedParameter, Protocol):
    """A parameter under ZeRO-1 or BF16_Optimizer, which share out the optimizer's state alone."""

    # set here; True leaves a copy out of the gradient's norm. Source: deepspeed/runtime/utils.py
    ds_pipe_replicated: bool
    _hp_mapping: FragmentMapping | None  # None if no part is here. Source: deepspeed/utils/mixed_precision_linkage.py
    _hp_grad: Tensor  # BF16_Optimizer's sum of gradients in fp32. Source: deepspeed/runtime/bf16_optimizer.py


class CommonOptimizer(Protocol):
    """What DeepSpeed's optimizers have in common. Source: deepspeed/runtime/base_optimizer.py, ZeROOptimizer."""

    optimizer: torch.optim.Optimizer  # whose parameters are the flat fp32 weights
    param_groups: list[dict[str, Any]]  # torch's

    def scale_if_loss(self, value: Tensor) -> Tensor: ...  # times the loss scale, if an operation of autograd's made it

    # drops gradients, BF16_Optimizer's fp32 sums and ZeRO-3's count of micro-batches, too
    def zero_grad(self) -> None: ...


class LossScaler(Protocol):
    """fp16's loss scale and the counts by which it moves. Source: deepspeed/runtime/fp16/loss_scaler.py,
    DynamicLossScaler.
    """

    cur_scale: float
    cur_iter: int
    last_overflow_iter: int
    cur_hysteresis: int


class Zero1Bucket(Protocol):
    """Gradients that wait for their reduction. Source: deepspeed/runtime/zero/stage_1_and_2.py, IPGBucket."""

    def clear(self) -> None: ...


class Zero1Optimizer(CommonOptimizer, Protocol):
    """ZeRO-1's in fp32 and fp16. Source: deepspeed/runtime/zero/stage_1_and_2.py, DeepSpeedZeroOptimizer."""

    loss_scaler: LossScaler  # under fp16; else a constant one
    single_partition_of_fp32_groups: list[Tensor]  # this rank's flat fp32 weights of each parameter group
    ipg_buckets: dict[torch.dtype, Zero1Bucket]
    # a parameter larger than a bucket that waits for its reduction
    extra_large_param_to_reduce: dict[torch.dtype, Tensor]
    params_already_reduced: list[bool]  # in this backward pass
    all_grad_tensors: dict[int, list[Tensor]]  # by parameter group, sums over earlier micro-batches
    averaged_gradients: dict[int, list[Tensor] | None]  # by parameter group, reduced ones
    grads_in_partition: Tensor | None  # memory for the reduced gradients of this rank's part
    grads_in_partition_offset: int  # how much of it is taken

    def update_lp_params(self) -> None: ...  # gives the model's weights the values of the fp32 ones; collective


class Bf16Optimizer(CommonOptimizer, Protocol):
    """ZeRO-1's in bf16, with sums of gradients in fp32. Source: deepspeed/runtime/bf16_optimizer.py, BF16_Optimizer."""

    fp32_groups_flat_partition: list[Tensor]  # this rank's flat fp32 weights of each parameter group
    fp32_groups_gradients: list[list[Tensor]]  # by parameter group and parameter, the fp32 sum
    fp32_groups_has_gradients: list[list[bool]]  # whether any gradient is in it
    # adds one to it: (..., group, parameter, zero it after)
    _update_hp_grad: Callable[[UnshardedParameter, int, int, bool], None]

    def clear_lp_grads(self) -> None: ...  # drops the bf16 gradients

    def update_hp_grads(self, clear_lp_grads: bool) -> None: ...  # adds all of them to the fp32 sums

    def update_lp_params(self) -> None: ...  # gives the model's weights the values of the fp32 ones; collective


class ReplaceableCoordinator(Protocol):
    """What DeepSpeed still asks of its parameter coordinator where its hooks are gone.

    Source: deepspeed/runtime/zero/stage3.py, parameter_offload.py; partitioned_param_coordinator.py,
    PartitionedParameterCoordinator.
    """

    hierarchy: int  # depth of its logging
    is_complete_trace: Callable[[], bool]  # whether the order of fetches is known

    def release_backward_leftovers(self) -> None: ...  # the end of a backward pass

    def release_and_reset_all(self, module: nn.Module) -> None: ...  # lets all parameters go, persistent ones, too


class ParameterCoordinator(ReplaceableCoordinator, Protocol):
    """Fetches and releases parameters. Source: deepspeed/runtime/zero/partitioned_param_coordinator.py."""

    # parameters that no active module uses
    def release_sub_module(self, submodule: nn.Module, forward: bool) -> None: ...

    def reset_step(self) -> None: ...  # the end of a pass: its order of fetches is complete


class Zero3Offload(Protocol):
    """ZeRO-3's hooks around modules. Source: deepspeed/runtime/zero/parameter_offload.py, DeepSpeedZeRoOffload."""

    param_coordinator: ReplaceableCoordinator  # what the hooks call; the next four are what it is made with
    _prefetch_bucket_sz: int
    _max_reuse_distance_in_numel: int
    _max_available_parameters_in_numel: int
    _DeepSpeedZeRoOffload__allgather_stream: torch.cuda.Stream | None

    def get_param_coordinator(self) -> ParameterCoordinator: ...  # param_coordinator, where it is DeepSpeed's own

    def setup_zero_stage3_hooks(self) -> None: ...  # on all modules

    def _remove_module_hooks(self) -> None: ...


class OffloadedModule(Protocol):
    """The model under ZeRO-3. Source: deepspeed/runtime/zero/parameter_offload.py, DeepSpeedZeRoOffload."""

    ds_inflight_param_registry: object  # parameters on their way, for coordinators


class Zero3Bucket(Protocol):
    """Gradients that wait for their reduction. Source: deepspeed/runtime/zero/stage3.py, IPGBucketZ3."""

    def clear_params(self) -> None: ...  # and keep the bucket's memory


class Zero3Optimizer(CommonOptimizer, Protocol):
    """ZeRO-3's. Source: deepspeed/runtime/zero/stage3.py, DeepSpeedZeroOptimizer_Stage3."""

    parameter_offload: Zero3Offload
    loss_scaler: LossScaler  # under fp16; else a constant one
    dp_process_group: dist.ProcessGroup  # the ranks that share parameters
    communication_data_type: torch.dtype  # of gradients
    offload_optimizer: bool  # its state, and the sums of gradients, are in CPU memory
    micro_step_id: int  # number of the micro-batch in its step, from 0
    fp16_groups: list[list[ShardedParameter]]  # by sub-group
    sub_group_to_group_id: dict[int, int]  # the parameter group of each sub-group
    fp32_partitioned_groups_flat: list[Tensor]  # this rank's flat fp32 weights of each sub-group
    # by get_param_id, a parameter's sub-group, offset there, and padded elements
    grad_position: dict[int, tuple[int, int, int]]
    ipg_buckets: dict[torch.dtype, Zero3Bucket]
    reduce_and_partition_stream: torch.cuda.Stream | None  # None on a CPU
    independent_gradient_partition_epilogue: Callable[[], None]  # called at the end of every backward pass
    # on parameters, and in _leaf_module_hooks on modules: put gradients into buckets
    _grad_acc_hooks: list[RemovableHandle]
    _leaf_module_hooks: list[RemovableHandle]
    # by ds_id, this rank's shard of the sum, padded
    _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition: dict[int, Tensor]

    def get_param_id(self, param: ShardedParameter) -> int: ...

    # to the sums
    def partition_grads(self, params_to_release: list[ShardedParameter], grad_partitions: list[Tensor]) -> None: ...

    def create_reduce_and_remove_grad_hooks(self) -> None: ...

    # before a change of the fp32 weights: lets all whole parameters go
    def checkpoint_event_prologue(self) -> None: ...

    def checkpoint_event_epilogue(self) -> None: ...  # after it: makes persistent ones whole again; collective

    # gives shards the fp32 weights' values
    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None: ...


HostOptimizer = Zero1Optimizer | Bf16Optimizer | Zero3Optimizer


class HostEngine(Protocol):
    """DeepSpeed's engine. Source: deepspeed/runtime/engine.py, DeepSpeedEngine."""

    module: nn.Module
    optimizer: HostOptimizer
    device: torch.device
    global_steps: int  # this and the next two are COUNTERS of checkpoint/state.py
    global_samples: int
    skipped_steps: int
    _take_model_step: Callable[[dict[str, Any] | None], None]  # the optimizer's, in a step's last `step`

    def __call__(self, *inputs: Any) -> Any: ...  # the model's forward pass

    def backward(self, loss: Tensor) -> Tensor: ...

    def step(self) -> None: ...  # the end of a micro-batch; after the last one, the optimizer's step

    def train(self) -> nn.Module: ...

    def eval(self) -> nn.Module: ...

    def gradient_accumulation_steps(self) -> int: ...

    def is_gradient_accumulation_boundary(self) -> bool: ...  # whether the micro-batch is its step's last

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def get_global_grad_norm(self) -> float | Tensor: ...  # of the last step, before clipping

    def was_step_applied(self) -> bool: ...  # False: the gradient was not finite


class HostPipelineEngine(HostEngine, Protocol):
    """DeepSpeed's pipeline engine. Source: deepspeed/runtime/pipe/engine.py, PipelineEngine."""

    micro_batches: int  # of a step
    total_loss: Tensor | None  # what it reports of a step, on the last stage
    _running_engine_backward: bool  # gradients are refused where it is False. Source: deepspeed/runtime/engine.py
    _INSTRUCTION_MAP: dict[type[schedule.PipeInstruction], Callable[..., None]]  # what runs a schedule's instructions
    _train_schedule: Callable[[], schedule.PipeSchedule]  # this stage's, of a step
    _inference_schedule: Callable[[int], schedule.PipeSchedule]  # and of so many micro-batches' forward passes

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
    """Where ranks are in pipelines. Source: deepspeed/runtime/pipe/topology.py, PipelineParallelGrid."""

    def get_stage_id(self) -> int: ...

    def get_data_parallel_world_size(self) -> int: ...  # number of pipelines

    def stage_to_global(self, stage_id: int, data: int) -> int: ...  # the rank of a stage of pipeline `data`


class StageModule(Protocol):
    """A pipeline's module on one rank. Source: deepspeed/runtime/pipe/module.py, PipelineModule."""

    parts: list[int]  # first layers of all stages, and the end
    _grid: StageGrid

    # sets `parts` and the bounds of this stage; ours comes in its place
    def _partition_layers(self, method: str) -> None: ...

    def _set_bounds(self, start: int, stop: int) -> None: ...  # this stage has the layers start, ..., stop - 1

    def _build(self) -> None: ...  # makes this stage's layers; ours comes in its place


def trained(parameters: Iterable[nn.Parameter]) -> list[TrainedParameter]:
    """Parameters of a model under any optimizer of DeepSpeed's."""
    return cast("list[TrainedParameter]", list(parameters))


def sharded(parameters: Iterable[nn.Parameter]) -> list[ShardedParameter]:
    """Parameters of a model under ZeRO-3."""
    return cast("list[ShardedParameter]", list(parameters))


def unsharded(parameters: Iterable[nn.Parameter]) -> list[UnshardedParameter]:
    """Parameters of a model under ZeRO-1 or BF16_Optimizer."""
    return cast("list[UnshardedParameter]", list(parameters))


def is_zero3(optimizer: HostOptimizer) -> "TypeIs[Zero3Optimizer]":
    """Whether the model's parameters are ShardedParameters."""
    return isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)


def is_bf16(optimizer: HostOptimizer) -> "TypeIs[Bf16Optimizer]":
    """Whether gradients are summed up in fp32, beside the bf16 ones."""
    return isinstance(optimizer, BF16_Optimizer)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape in the model, also where ZeRO-3 holds it in shards, or a pipeline's stage some rows of it."""
    return tuple(getattr(parameter, "ds_shape", getattr(parameter, "whole_shape", parameter.shape)))
