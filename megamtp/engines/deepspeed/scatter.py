"""Gradients of a module to ZeRO-3's shards: one grouped reduce-scatter a module, straight from where backward left
them.

As shipped, DeepSpeed lets gradients wait in a bucket until the next module's would not fit, copies them apart in Python
loops over all ranks, and makes the host wait at the end. See traffic.py.
Source of what is replaced: deepspeed/runtime/zero/stage3.py (its `ipg` buckets),
deepspeed/runtime/comm/coalesced_collectives.py.

Tests: tests/distributed/test_gather.py, tests/gpu/test_emulated.py.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamtp.engines.deepspeed.gather import Streams, Unit
from megamtp.engines.deepspeed.members import ShardedParameter, Zero3Optimizer

MAX_LEAVING = 2  # modules whose gradients may wait for their reduction; the device, not the host, waits for older ones


class Scatter:
    """Sums a module's gradients over the ranks as soon as the last of them is there, and adds the own shard to
    DeepSpeed's sums.

    Attributes:
        divides: whether the sum is turned into a mean here. For a power of two it is not: the division is then exact
            wherever it is done, and costs nothing in the factor of the loss (see ZeroEngine.train_batch). Otherwise
            each gradient is divided before the sum, as DeepSpeed does it: dividing after it would give other last
            digits.
    """

    def __init__(self, units: list[Unit], optimizer: Zero3Optimizer, group: dist.ProcessGroup, streams: Streams):
        self._optimizer, self._group, self._streams = optimizer, group, streams
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self.divides = self._world_size & (self._world_size - 1) != 0
        self._dtype = optimizer.communication_data_type
        self._unit_of = {parameter: unit for unit in units for parameter in unit.parameters}
        self._sums = {unit: self._shards_of_sums(unit) for unit in units}
        self._leaving: deque[tuple[torch.cuda.Event | None, list[Tensor]]] = deque()

    def _shards_of_sums(self, unit: Unit) -> list[Tensor]:
        """Where DeepSpeed sums up each parameter's gradient over the micro-batches, without padding."""
        sums = self._optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        # The last ranks' shards of a parameter may hold fewer elements than the others', or none.
        real = [
            max(0, min(size, parameter.ds_numel - self._rank * size))
            for size, parameter in zip(unit.shard_sizes, unit.parameters, strict=True)
        ]
        return [sums[parameter.ds_id][:number] for number, parameter in zip(real, unit.parameters, strict=True)]

    def add(self, parameter: ShardedParameter) -> Unit | None:
        """Called when backward has added to a gradient; the module, once all of its gradients have been sent."""
        unit = self._unit_of[parameter]
        if not getattr(parameter, "ds_grad_is_ready", True):
            return None
        unit.ready += 1
        if unit.ready < len(unit.parameters):
            return None
        self._send(unit)
        return unit

    def end(self) -> None:
        """The end of a step, and of an interrupted one: what was sent may be freed, what was not is dropped."""
        for unit in self._sums:
            unit.ready = 0
        self._leaving.clear()

    def _send(self, unit: Unit) -> None:
        unit.ready = 0
        gradients = [gradient for parameter in unit.parameters if (gradient := parameter.grad) is not None]
        for parameter in unit.parameters:
            parameter.grad = None
        self._streams.follow_compute(self._streams.scatter)
        with self._streams.on(self._streams.scatter):
            whole = [self._padded(gradient, missing) for gradient, missing in zip(gradients, unit.padding, strict=True)]
            if self.divides:
                torch._foreach_div_(whole, self._world_size)
            shards = torch.empty(sum(unit.shard_sizes), dtype=self._dtype, device=self._streams.device).split(
                unit.shard_sizes
            )
            self._group.reduce_scatter_tensor_coalesced(list(shards), whole).wait()
            self._add_to_sums(unit, shards)
            self._leaving.append((self._streams.mark(self._streams.scatter), [*gradients, *whole, *shards]))
        if len(self._leaving) > MAX_LEAVING:
            sent, _ = self._leaving.popleft()
            self._streams.wait_for(sent, self._streams.compute)  # from here on the allocator may reuse that memory

    def _add_to_sums(self, unit: Unit, padded: Sequence[Tensor]) -> None:
        sums = self._sums[unit]
        shards = [shard[: len(total)] for shard, total in zip(padded, sums, strict=True)]
        if self._optimizer.offload_optimizer:  # sums in CPU memory, and what follows from that, are DeepSpeed's affair
            self._optimizer.partition_grads(unit.parameters, shards)
        elif self._optimizer.micro_step_id == 0:
            torch._foreach_copy_(sums, shards)
        else:
            torch._foreach_add_(sums, [shard.to(total.dtype) for shard, total in zip(shards, sums, strict=True)])

    def _padded(self, gradient: Tensor, missing: int) -> Tensor:
        flat = (gradient if gradient.dtype == self._dtype else gradient.to(self._dtype)).reshape(-1)
        return nn.functional.pad(flat, (0, missing)) if missing else flat


class DeviceOrderedStream(torch.cuda.Stream):
    """A stream whose `synchronize` makes the device wait instead of the host, and only where that is needed.

    DeepSpeed synchronises its reduction stream at the end of every backward pass. What follows reads the gradients on
    the device alone, so an order among streams is enough, and the host may go on. After a micro-batch that is not its
    step's last, nothing reads them at all.

    Attributes:
        is_awaited: tells whether anything reads the gradients next.
    """

    is_awaited: Callable[[], bool]

    def synchronize(self) -> None:
        if self.is_awaited():
            torch.cuda.current_stream(self.device).wait_stream(self)
