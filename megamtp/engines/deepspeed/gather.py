"""Gathers each module's weights from ZeRO-3's shards with one grouped all-gather, directly into the weights.

DeepSpeed itself assembles every fetched parameter from one piece per rank, in Python loops over all ranks, and makes
the CPU wait for earlier fetches. Here the CPU's work does not depend on the number of ranks, nothing is copied, and
only streams wait, never the CPU.

grouped_communication.py connects this to the model. Source of the replaced code:
deepspeed/runtime/zero/partitioned_param_coordinator.py, partition_parameters.py.

Tests: tests/distributed/test_gather.py, tests/gpu/test_emulated.py.
"""

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from megamtp.cluster.collectives import all_gather_single
from megamtp.engines.deepspeed.float8_shards import group_shards, shard_quantiser
from megamtp.engines.deepspeed.members import ShardedParameter, sharded
from megamtp.engines.deepspeed.streams import Streams
from megamtp.precision.operations import E4M3


@dataclass
class Buffer:
    """Memory for one module's gathered weights.

    Attributes:
        flat: a flat, padded tensor for each parameter: the output of the all-gather.
        weights: views of `flat` with the shapes of the unit's `receivers`.
        last_use: the event after which the memory may be overwritten.
    """

    flat: list[Tensor]
    weights: list[Tensor]
    last_use: torch.cuda.Event | None = None


class Unit:
    """The communication state of one module: its parameters are gathered, and its gradients are reduced, together.

    Attributes:
        parameters: all parameters, in DeepSpeed's order.
        float8: the weights that are gathered in fp8; the parameters themselves are never available in full.
        gathered: the other parameters that are available in full only while the module runs.
        persistent: the parameters that stay available in full until the end of the step.
        shard_sizes: number of elements in a shard of each parameter, with padding.
        padding: number of padding elements in all shards of each parameter.
        buffer: memory of the gathered weights, from the start of their gather until their release.
        handles: handles of the gather, until they have been waited for.
        offload_done: event after which offloaded weights are on the GPU and gathered.
        num_pins: while it is above 0, the weights are not released.
        num_ready_gradients: number of parameters whose gradient is complete.
    """

    def __init__(self, module: nn.Module, world_size: int):
        self.module = module
        self.parameters = sorted(sharded(module.parameters()), key=lambda parameter: parameter.ds_id)
        self.float8 = group_shards(module)
        self.float8_parameters = [parameter for shards in self.float8 for parameter in shards.parameters]
        in_float8 = set(self.float8_parameters)
        others = [parameter for parameter in self.parameters if parameter not in in_float8]
        self.gathered = [parameter for parameter in others if not parameter.ds_persist]
        self.persistent = [parameter for parameter in others if parameter.ds_persist]
        self.shard_sizes = [parameter.ds_tensor.numel() for parameter in self.parameters]
        self.padding = [
            size * world_size - parameter.ds_numel
            for size, parameter in zip(self.shard_sizes, self.parameters, strict=True)
        ]
        # Units with equal shapes share buffers.
        self.shapes = (
            tuple(tuple(parameter.ds_shape) for parameter in self.gathered),
            tuple(shards.shapes for shards in self.float8),
        )
        self.buffer: Buffer | None = None
        self.handles: list[dist.Work] = []
        self.offload_done: torch.cuda.Event | None = None
        self.num_pins = self.num_ready_gradients = 0

    @property
    def shards(self) -> list[Tensor]:
        """This rank's shards of all weights that are gathered. With fp8 among them, all are uint8."""
        shards = [parameter.ds_tensor for parameter in self.gathered]
        if not self.float8:
            return shards
        return [shard.view(torch.uint8) for shard in shards] + [
            shard for group in self.float8 for shard in group.shards
        ]

    @functools.cached_property
    def receivers(self) -> list[Any]:
        """The tensors whose `data` are the gathered weights. The weights in fp8 must have their quantiser."""
        quantised = [shards.group.quantised for shards in self.float8]
        return [*self.gathered, *(matrix for weights in quantised if weights for matrix in weights.matrices)]


class WeightGatherer:
    """Gathers the weights of units before they run, and releases them afterwards.

    The first pass records the order in which units need their weights. From then on, the weights of the next
    `num_prefetched` units are always in flight. Training and evaluation have separate orders. Weights do not change
    between the micro-batches of a step, so prefetching continues from the end of one micro-batch to the start of the
    next.

    Released memory is reused after its `last_use` event. So the CPU never waits, and cannot run so far ahead that
    memory usage grows.
    """

    def __init__(self, units: list[Unit], group: dist.ProcessGroup, streams: Streams, num_prefetched: int):
        self._units, self._group, self._streams, self._num_prefetched = units, group, streams, num_prefetched
        self._world_size, self._coalesces = dist.get_world_size(group), dist.get_backend(group) != "gloo"
        self._free_buffers: dict[tuple, deque[Buffer]] = {}  # by the shapes of the weights
        self._orders: dict[bool, list[Unit]] = {True: [], False: []}  # in training, in evaluation
        self._is_complete = {True: False, False: False}
        self._training, self._position = True, 0
        self._another_micro_batch_follows = False  # whether another micro-batch with the same weights follows
        self._shape_only: list[Unit] = []  # units whose weights have shapes but no memory
        dtype = units[0].parameters[0].dtype
        self._empty = {kind: torch.empty(0, dtype=kind, device=streams.device) for kind in (dtype, E4M3)}
        self._nan = torch.full((1,), float("nan"), dtype=dtype, device=streams.device)
        self._quantise_shards = shard_quantiser(
            [group for unit in units for group in unit.float8], group, streams.device
        )

    def start_forward(self, training: bool, another_micro_batch_follows: bool) -> None:
        """Starts a forward pass: completes the order that the previous pass recorded, and releases outdated weights.

        Args:
            another_micro_batch_follows: whether another micro-batch of the same step follows this one.
        """
        self._is_complete[self._training] = bool(self._orders[self._training])
        if not (self._another_micro_batch_follows and training):
            self.release_all()
            self._quantise_shards()
            self._streams.wait_for_compute(self._streams.gather)  # the optimizer may have changed the shards
        self._training, self._position, self._another_micro_batch_follows = training, 0, another_micro_batch_follows

    def end_backward(self) -> None:
        """Called at the end of a backward pass. Releases weights that are not prefetched for the next micro-batch."""
        if not (self._another_micro_batch_follows and self.is_complete_trace()):
            self.release_all()

    def is_complete_trace(self) -> bool:
        """Returns whether the order of the current kind of pass is recorded completely. Named as in DeepSpeed."""
        return self._is_complete[self._training]

    def fetch(self, unit: Unit) -> None:
        """Makes the current stream wait for the unit's weights, and starts the gathers of the following units."""
        missing = [parameter for parameter in unit.persistent if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            missing[0].all_gather(missing)
        self._advance(unit)
        self._start_gather(unit)
        self._wait(unit)
        for following in self._units_to_prefetch(unit):
            self._start_gather(following)

    def set_shapes(self, unit: Unit) -> None:
        """Gives weights their shapes without memory, for a backward pass that reads no weights, like the embedding's.

        Autograd only compares the shapes of weight and gradient.
        """
        if unit.buffer is not None:  # gathered for the next micro-batch
            return
        for parameter in unit.gathered:
            parameter.data = self._shape_only_data(parameter)
        self._shape_only.append(unit)

    def release(self, unit: Unit) -> None:
        """Releases the unit's weights, unless they are pinned or the unit is one of the next two in the order.

        The next two, because after the first layer's backward pass the embedding and the first layer run next.
        """
        if not (self.is_complete_trace() and unit in itertools.islice(self._upcoming(), 2)):
            self._release(unit)

    @contextlib.contextmanager
    def pinned(self, unit: Unit) -> Iterator[None]:
        """Keeps the unit's weights from their first use until the end of the block, so that they are gathered once."""
        unit.num_pins += 1
        try:
            yield
        finally:
            unit.num_pins = max(0, unit.num_pins - 1)
            self._release(unit)

    def release_all(self, pinned: bool = False) -> None:
        """Releases all weights; with `pinned`, also pinned weights."""
        self._another_micro_batch_follows = False
        for unit in self._units:
            if pinned:
                unit.num_pins = 0
            self._release(unit)
        while self._shape_only:
            unit = self._shape_only.pop()
            if unit.buffer is None:
                self._clear_weights(unit)
        for shapes, buffers in self._free_buffers.items():
            # A unit then has the same memory in each step, as CUDA graphs that read it need.
            self._free_buffers[shapes] = deque(sorted(buffers, key=lambda buffer: buffer.flat[0].data_ptr()))

    def _advance(self, unit: Unit) -> None:
        """Moves on to `unit` in the recorded order. Records a new order from the position where a pass deviates."""
        if self._next() is not unit:
            del self._orders[self._training][self._position :]
            self._orders[self._training].append(unit)
            self._is_complete[self._training] = False
        self._position += 1

    def _next(self) -> Unit | None:
        order = self._orders[self._training]
        return order[self._position] if self._position < len(order) else None

    def _upcoming(self) -> Iterator[Unit]:
        """Yields the units in the rest of the order, and then those of the next micro-batch if there is one."""
        order = self._orders[self._training]
        yield from itertools.islice(order, self._position, None)
        if self._another_micro_batch_follows:
            yield from order

    def _units_to_prefetch(self, current: Unit) -> list[Unit]:
        """Returns the next units in the order, without the current one."""
        units: list[Unit] = []
        if not self.is_complete_trace():
            return units
        for unit in self._upcoming():
            if len(units) == self._num_prefetched:
                break
            if unit is not current and unit not in units:
                units.append(unit)
        return units

    def _start_gather(self, unit: Unit) -> None:
        if unit.buffer is not None:
            return
        shards = unit.shards
        with self._streams.on(self._streams.gather):
            offloaded = self._streams.on_gpu and bool(shards) and not shards[0].is_cuda
            if self._world_size == 1 or not shards:
                unit.buffer = self._local_buffer(unit, offloaded)
            else:
                if offloaded:
                    shards = [shard.to(self._streams.device, non_blocking=True) for shard in shards]
                unit.buffer = self._take_buffer(unit, shards)
                self._streams.wait_event(unit.buffer.last_use, self._streams.gather)
                unit.handles = self._all_gather(unit.buffer.flat, shards)
                for handle in unit.handles if offloaded else ():
                    handle.wait()  # on the gather stream: later copies may get the memory of these shards
            if offloaded:
                unit.offload_done = self._streams.record(self._streams.gather)
        for receiver, weight in zip(unit.receivers, unit.buffer.weights, strict=True):
            receiver.data = weight
        for parameter in unit.float8_parameters:
            parameter.data = self._shape_only_data(parameter)
        for parameter in (*unit.gathered, *unit.float8_parameters):
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def _shape_only_data(self, parameter: ShardedParameter) -> Tensor:
        """Returns NaN in the parameter's shape, so that no code can read it unnoticed."""
        return self._nan.expand(parameter.ds_shape)

    def _all_gather(self, outputs: list[Tensor], shards: list[Tensor]) -> list[dist.Work]:
        """Starts one collective for all parameters, or one per parameter on gloo.

        torch's gloo backend stores the name of its latest work in a string that two threads share without a lock. A
        name of more than 15 characters is allocated on the heap and then freed twice, so ALLGATHER_COALESCED can
        crash.
        """
        if self._coalesces:
            return [self._group.allgather_into_tensor_coalesced(outputs, shards)]
        pairs = zip(outputs, shards, strict=True)
        return [all_gather_single(output, shard, group=self._group, async_op=True) for output, shard in pairs]

    def _take_buffer(self, unit: Unit, shards: list[Tensor]) -> Buffer:
        free_buffers = self._free_buffers.get(unit.shapes)
        if free_buffers:
            return free_buffers.popleft()
        # New memory is allocated on the gather stream, so no unfinished work of another stream can use it.
        flat = [
            torch.empty(shard.numel() * self._world_size, dtype=shard.dtype, device=self._streams.device)
            for shard in shards[: len(unit.gathered)]
        ]
        weights = [
            tensor.view(parameter.dtype)[: parameter.ds_numel].view(parameter.ds_shape)
            for tensor, parameter in zip(flat, unit.gathered, strict=True)
        ]
        for group in unit.float8:
            group_flat, matrices = group.empty_gathered(self._world_size, self._streams.device)
            flat += group_flat
            weights += matrices
        return Buffer(flat, weights)

    def _local_buffer(self, unit: Unit, offloaded: bool) -> Buffer:
        """Returns the weights of a single rank, which are its shards, copied to the device if they are offloaded."""
        memories = [*(parameter.ds_tensor for parameter in unit.gathered), *(group.memory for group in unit.float8)]
        if offloaded:
            memories = [memory.to(self._streams.device, non_blocking=True) for memory in memories]
            for memory in memories:
                # Otherwise the allocator could give its memory to later copies too early.
                self._streams.mark_used_by_compute(memory)
        others, in_float8 = memories[: len(unit.gathered)], memories[len(unit.gathered) :]
        weights = [memory.view(parameter.ds_shape) for memory, parameter in zip(others, unit.gathered, strict=True)]
        weights += [group.one_matrix(memory) for memory, group in zip(in_float8, unit.float8, strict=True)]
        return Buffer(memories, weights)

    def _wait(self, unit: Unit) -> None:
        for handle in unit.handles:
            handle.wait()
        self._streams.wait_event(unit.offload_done, self._streams.compute)
        unit.handles, unit.offload_done = [], None

    def _release(self, unit: Unit) -> None:
        if unit.buffer is None or unit.num_pins:
            return
        self._wait(unit)
        if self._world_size > 1 and unit.buffer.flat:
            unit.buffer.last_use = self._streams.record(self._streams.compute)
            self._free_buffers.setdefault(unit.shapes, deque()).append(unit.buffer)
        unit.buffer = None
        self._clear_weights(unit)

    def _clear_weights(self, unit: Unit) -> None:
        for tensor in (*unit.receivers, *unit.float8_parameters):
            tensor.data = self._empty[tensor.dtype]
        for parameter in (*unit.gathered, *unit.float8_parameters):
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
