"""Grouped traffic: ZeRO-3's weights and gradients moved by our own hooks, a module at a time, at a host cost that does
not depend on the number of ranks.

DeepSpeed keeps what it is good at: shards, optimizer, clipping, loss scale, offloading, checkpoints. Its module and
gradient hooks, its parameter coordinator and its buckets are replaced, and put back by `remove`.

Tests: tests/distributed/test_gather.py, tests/gpu/test_emulated.py.
"""

import contextlib

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamtp.engines.deepspeed.gather import Gather, Streams, Unit
from megamtp.engines.deepspeed.members import HostEngine, ShardedParameter, is_zero3, sharded
from megamtp.engines.deepspeed.scatter import DeviceOrderedStream, Scatter


class Coordinator:
    """What DeepSpeed still asks of its parameter coordinator when its hooks are gone: to let weights go."""

    hierarchy = 0  # its depth of logging, which it sets

    def __init__(self, gather: Gather):
        self._gather = gather
        self.is_complete_trace = gather.is_complete_trace

    def release_backward_leftovers(self) -> None:
        """The end of a backward pass."""
        self._gather.end()

    def release_and_reset_all(self, module: nn.Module) -> None:
        """Before the optimizer's step, and after an interrupted one: persistent weights go, too."""
        self._gather.release_all(pinned=True)
        for parameter in sharded(module.parameters()):
            if parameter.ds_persist:
                parameter.partition()


class GroupedTraffic:
    """Gather and Scatter of one DeepSpeed ZeRO-3 engine, and the hooks that call them.

    Args:
        modules: those whose parameters travel together; all of the model's parameters are in exactly one of them.
        prefetch: modules whose weights are on their way before they are needed.
    """

    def __init__(self, engine: HostEngine, modules: list[nn.Module], prefetch: int):
        assert is_zero3(engine.optimizer)
        self._engine, self._optimizer = engine, engine.optimizer
        optimizer = self._optimizer
        streams = Streams(torch.device(deepspeed.get_accelerator().current_device_name()))
        group = optimizer.dp_process_group
        self._units = {module: Unit(module, dist.get_world_size(group)) for module in modules}
        units = list(self._units.values())
        self._replaced = optimizer.parameter_offload.param_coordinator, optimizer.reduce_and_partition_stream
        self._remove_deepspeeds_hooks()
        if streams.on_gpu and optimizer.offload_optimizer:
            # the host, which steps, waits for it in DeepSpeed's epilogue
            streams.scatter = optimizer.reduce_and_partition_stream
        elif streams.on_gpu:
            streams.scatter = optimizer.reduce_and_partition_stream = DeviceOrderedStream(streams.device)
            streams.scatter.is_awaited = engine.is_gradient_accumulation_boundary
        self.gather = Gather(units, group, streams, prefetch)
        self.scatter = Scatter(units, optimizer, group, streams)
        optimizer.parameter_offload.param_coordinator = Coordinator(self.gather)
        self._epilogue = optimizer.independent_gradient_partition_epilogue
        optimizer.independent_gradient_partition_epilogue = self._end_backward
        self._hooks = [engine.module.register_forward_pre_hook(self._start)]
        for unit in units:
            self._hook(unit)

    def pinned(self, module: nn.Module) -> contextlib.AbstractContextManager:
        """Keeps a module's weights gathered from their first use to the end of the block."""
        return self.gather.pinned(self._units[module])

    def remove(self) -> None:
        """Gives the engine DeepSpeed's own parts back."""
        optimizer = self._optimizer
        self.gather.release_all(pinned=True)
        for hook in self._hooks:
            hook.remove()
        del optimizer.independent_gradient_partition_epilogue
        optimizer.parameter_offload.param_coordinator, optimizer.reduce_and_partition_stream = self._replaced
        optimizer.parameter_offload.setup_zero_stage3_hooks()
        optimizer.create_reduce_and_remove_grad_hooks()

    def _remove_deepspeeds_hooks(self) -> None:
        optimizer = self._optimizer
        optimizer.parameter_offload._remove_module_hooks()
        for hooks in (optimizer._grad_acc_hooks, optimizer._leaf_module_hooks):
            for hook in hooks:
                hook.remove()
            hooks.clear()

    def _hook(self, unit: Unit) -> None:
        reads_weights_in_backward = not isinstance(unit.module, nn.Embedding)
        before_backward = self.gather.fetch if reads_weights_in_backward else self.gather.show_shapes

        def after_forward(module: nn.Module, arguments: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            self.gather.release(unit)
            result = output[0] if isinstance(output, tuple) else output
            if torch.is_grad_enabled() and result.requires_grad:
                result.register_hook(lambda gradient: before_backward(unit))

        self._hooks += [
            unit.module.register_forward_pre_hook(lambda module, arguments: self.gather.fetch(unit)),
            unit.module.register_forward_hook(after_forward),
            *(parameter.register_post_accumulate_grad_hook(self._after_gradient) for parameter in unit.parameters),
        ]

    def _after_gradient(self, parameter: ShardedParameter) -> None:
        sent = self.scatter.add(parameter)
        if sent is not None:
            self.gather.release(sent)  # the last gradient of a module ends its backward pass

    def _start(self, model: nn.Module, arguments: tuple) -> None:
        self.gather.start(
            model.training, repeats=model.training and not self._engine.is_gradient_accumulation_boundary()
        )

    def _end_backward(self) -> None:
        self._epilogue()  # after a step's last micro-batch, makes the current stream wait for the last reduction
        if self._engine.is_gradient_accumulation_boundary():
            self.scatter.end()
