"""Reduces each module's gradients to ZeRO-3's shards with one grouped reduce-scatter, without copying them first.

DeepSpeed itself collects gradients in a bucket until those of the next module no longer fit, splits the bucket in
Python loops over all ranks, and makes the CPU wait at the end.

grouped_communication.py connects this to the model. Source of the replaced code: deepspeed/runtime/zero/stage3.py (its
`ipg` buckets), deepspeed/runtime/comm/coalesced_collectives.py.

Tests: tests/distributed/test_gather.py, tests/gpu/test_emulated.py.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamtp.engines.deepspeed.gather import Unit
from megamtp.engines.deepspeed.members import ShardedParameter, Zero3Optimizer
from megamtp.engines.deepspeed.streams import Streams

MAX_IN_FLIGHT = 2  # reductions that may be unfinished; the compute stream waits for older reductions


class GradientReducer:
    """Sums a unit's gradients over the ranks once all of them are complete, and adds this rank's shard to the sums.

    The sums over micro-batches are DeepSpeed's own tensors.

    Attributes:
        averages: whether gradients are divided by the number of ranks. It is false if that number is a power of two:
            the division is then exact wherever it is done, so the factor of the loss includes it (see
            ZeroEngine.train_batch). Otherwise gradients are divided before the sum, as in DeepSpeed: a division after
            the sum would round differently.
    """

    def __init__(self, units: list[Unit], optimizer: Zero3Optimizer, group: dist.ProcessGroup, streams: Streams):
        self._optimizer, self._group, self._streams = optimizer, group, streams
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self.averages = self._world_size & (self._world_size - 1) != 0
        self._dtype = optimizer.communication_data_type
        self._unit_of = {parameter: unit for unit in units for parameter in unit.parameters}
        self._sums = {unit: self._sums_of(unit) for unit in units}
        self._in_flight: deque[tuple[torch.cuda.Event | None, list[Tensor]]] = deque()

    def _sums_of(self, unit: Unit) -> list[Tensor]:
        """Returns DeepSpeed's sums of each parameter's gradient over the micro-batches, without padding."""
        sums = self._optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        # The last ranks' shards of a parameter have fewer elements than the other ranks' shards, or none.
        sizes = [
            max(0, min(size, parameter.ds_numel - self._rank * size))
            for size, parameter in zip(unit.shard_sizes, unit.parameters, strict=True)
        ]
        return [sums[parameter.ds_id][:size] for size, parameter in zip(sizes, unit.parameters, strict=True)]

    def add(self, parameter: ShardedParameter) -> Unit | None:
        """Called when backward has accumulated a gradient.

        Returns:
            The parameter's unit if this was the unit's last gradient, and its reduction has been started; else None.
        """
        unit = self._unit_of[parameter]
        if not getattr(parameter, "ds_grad_is_ready", True):
            return None
        unit.num_ready_gradients += 1
        if unit.num_ready_gradients < len(unit.parameters):
            return None
        self._start_reduction(unit)
        return unit

    def end_step(self) -> None:
        """Called at the end of a step, complete or interrupted. Discards gradients whose reduction has not started."""
        for unit in self._sums:
            unit.num_ready_gradients = 0
        self._in_flight.clear()

    def _start_reduction(self, unit: Unit) -> None:
        unit.num_ready_gradients = 0
        gradients = [gradient for parameter in unit.parameters if (gradient := parameter.grad) is not None]
        for parameter in unit.parameters:
            parameter.grad = None
        self._streams.wait_for_compute(self._streams.reduce)
        with self._streams.on(self._streams.reduce):
            padded = [self._pad(gradient, padding) for gradient, padding in zip(gradients, unit.padding, strict=True)]
            if self.averages:
                torch._foreach_div_(padded, self._world_size)
            shards = torch.empty(sum(unit.shard_sizes), dtype=self._dtype, device=self._streams.device).split(
                unit.shard_sizes
            )
            self._group.reduce_scatter_tensor_coalesced(list(shards), padded).wait()
            self._add_to_sums(unit, shards)
            self._in_flight.append((self._streams.record(self._streams.reduce), [*gradients, *padded, *shards]))
        if len(self._in_flight) > MAX_IN_FLIGHT:
            end, _ = self._in_flight.popleft()
            self._streams.wait_event(end, self._streams.compute)  # from here on the allocator may reuse the memory

    def _add_to_sums(self, unit: Unit, padded_shards: Sequence[Tensor]) -> None:
        sums = self._sums[unit]
        shards = [shard[: len(total)] for shard, total in zip(padded_shards, sums, strict=True)]
        if self._optimizer.offload_optimizer:  # DeepSpeed manages sums in CPU memory
            self._optimizer.partition_grads(unit.parameters, shards)
        elif self._optimizer.micro_step_id == 0:
            torch._foreach_copy_(sums, shards)
        else:
            torch._foreach_add_(sums, [shard.to(total.dtype) for shard, total in zip(shards, sums, strict=True)])

    def _pad(self, gradient: Tensor, num_missing: int) -> Tensor:
        flat = (gradient if gradient.dtype == self._dtype else gradient.to(self._dtype)).reshape(-1)
        return nn.functional.pad(flat, (0, num_missing)) if num_missing else flat


class DeviceOrderedStream(torch.cuda.Stream):
    """A stream whose `synchronize` blocks the current stream instead of the CPU, and only if necessary.

    DeepSpeed synchronizes its reduction stream at the end of every backward pass. Only the GPU reads the gradients
    after that, so the order of streams is sufficient. If the micro-batch is not the last one of its step, nothing reads
    them, and no stream needs to wait.

    Attributes:
        is_needed: returns whether the gradients are read next.
    """

    is_needed: Callable[[], bool]

    def synchronize(self) -> None:
        if self.is_needed():
            torch.cuda.current_stream(self.device).wait_stream(self)
