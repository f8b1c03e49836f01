"""Grouped communication: one collective per module for ZeRO-3's weights, and one for its gradients.

The CPU's work for a module does not depend on the number of ranks. DeepSpeed's shards, optimizer, clipping, loss
scale, offloading and checkpoints stay in use. This module replaces DeepSpeed's module and gradient hooks, parameter
coordinator and buckets. `remove` restores them.

Tests: tests/distributed/test_gather.py, tests/gpu/test_emulated.py.
"""

import contextlib

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamtp.engines.deepspeed.gather import Unit, WeightGatherer
from megamtp.engines.deepspeed.members import DeepSpeedEngine, ShardedParameter, is_zero3, sharded
from megamtp.engines.deepspeed.reduction import DeviceOrderedStream, GradientReducer
from megamtp.engines.deepspeed.streams import Streams


class Coordinator:
    """Replaces DeepSpeed's parameter coordinator.

    It has only the methods that DeepSpeed still calls when its hooks are removed: they release weights.
    """

    hierarchy = 0  # nesting depth of DeepSpeed's log messages; DeepSpeed sets it

    def __init__(self, gatherer: WeightGatherer):
        self._gatherer = gatherer
        self.is_complete_trace = gatherer.is_complete_trace

    def release_backward_leftovers(self) -> None:
        """Called at the end of a backward pass."""
        self._gatherer.end_backward()

    def release_and_reset_all(self, module: nn.Module) -> None:
        """Called before the optimizer's step and after an interrupted step. Also releases persistent weights."""
        self._gatherer.release_all(pinned=True)
        for parameter in sharded(module.parameters()):
            if parameter.ds_persist:
                parameter.partition()


class GroupedCommunication:
    """The WeightGatherer and GradientReducer of a DeepSpeed ZeRO-3 engine, and the hooks that call them.

    Args:
        modules: each module's parameters are gathered and reduced together. Every parameter of the model belongs to
            exactly one of them.
        num_prefetched: number of modules whose weights are gathered ahead of their use.
    """

    def __init__(self, engine: DeepSpeedEngine, modules: list[nn.Module], num_prefetched: int):
        assert is_zero3(engine.optimizer)
        self._engine, self._optimizer = engine, engine.optimizer
        optimizer = self._optimizer
        streams = Streams(torch.device(deepspeed.get_accelerator().current_device_name()))
        group = optimizer.dp_process_group
        self._units = {module: Unit(module, dist.get_world_size(group)) for module in modules}
        units = list(self._units.values())
        self._replaced = optimizer.parameter_offload.param_coordinator, optimizer.reduce_and_partition_stream
        self._remove_deepspeed_hooks()
        if streams.on_gpu and optimizer.offload_optimizer:
            # DeepSpeed's epilogue makes the CPU, which runs the optimizer, wait for this stream.
            streams.reduce = optimizer.reduce_and_partition_stream
        elif streams.on_gpu:
            streams.reduce = optimizer.reduce_and_partition_stream = DeviceOrderedStream(streams.device)
            streams.reduce.is_needed = engine.is_gradient_accumulation_boundary
        self.gatherer = WeightGatherer(units, group, streams, num_prefetched)
        self.reducer = GradientReducer(units, optimizer, group, streams)
        optimizer.parameter_offload.param_coordinator = Coordinator(self.gatherer)
        self._epilogue = optimizer.independent_gradient_partition_epilogue
        optimizer.independent_gradient_partition_epilogue = self._end_backward
        self._hooks = [engine.module.register_forward_pre_hook(self._start_forward)]
        for unit in units:
            self._register_hooks(unit)

    def pinned(self, module: nn.Module) -> contextlib.AbstractContextManager:
        """Keeps a module's weights gathered from their first use until the end of the block."""
        return self.gatherer.pinned(self._units[module])

    def remove(self) -> None:
        """Restores DeepSpeed's own hooks, coordinator and buckets. Layers in fp8 cannot use these."""
        assert not any(unit.float8 for unit in self._units.values())
        optimizer = self._optimizer
        self.gatherer.release_all(pinned=True)
        for hook in self._hooks:
            hook.remove()
        del optimizer.independent_gradient_partition_epilogue
        optimizer.parameter_offload.param_coordinator, optimizer.reduce_and_partition_stream = self._replaced
        optimizer.parameter_offload.setup_zero_stage3_hooks()
        optimizer.create_reduce_and_remove_grad_hooks()

    def _remove_deepspeed_hooks(self) -> None:
        optimizer = self._optimizer
        optimizer.parameter_offload._remove_module_hooks()
        for hooks in (optimizer._grad_acc_hooks, optimizer._leaf_module_hooks):
            for hook in hooks:
                hook.remove()
            hooks.clear()

    def _register_hooks(self, unit: Unit) -> None:
        reads_weights_in_backward = not isinstance(unit.module, nn.Embedding)
        before_backward = self.gatherer.fetch if reads_weights_in_backward else self.gatherer.set_shapes

        def after_forward(module: nn.Module, arguments: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            self.gatherer.release(unit)
            result = output[0] if isinstance(output, tuple) else output
            if torch.is_grad_enabled() and result.requires_grad:
                result.register_hook(lambda gradient: before_backward(unit))

        self._hooks += [
            unit.module.register_forward_pre_hook(lambda module, arguments: self.gatherer.fetch(unit)),
            unit.module.register_forward_hook(after_forward),
            *(parameter.register_post_accumulate_grad_hook(self._after_gradient) for parameter in unit.parameters),
        ]

    def _after_gradient(self, parameter: ShardedParameter) -> None:
        finished_unit = self.reducer.add(parameter)
        if finished_unit is not None:
            self.gatherer.release(finished_unit)  # the unit's last gradient ends its backward pass

    def _start_forward(self, model: nn.Module, arguments: tuple) -> None:
        self.gatherer.start_forward(
            model.training,
            another_micro_batch_follows=model.training and not self._engine.is_gradient_accumulation_boundary(),
        )

    def _end_backward(self) -> None:
        self._epilogue()  # after the last micro-batch of a step: makes the current stream wait for the last reduction
        if self._engine.is_gradient_accumulation_boundary():
            self.reducer.end_step()
