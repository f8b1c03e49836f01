"""Whole weights for a module while it runs, from ZeRO-3's shards: one grouped collective a module, straight into the
weights.

As shipped, DeepSpeed copies every fetched parameter together from one piece per rank, in Python loops over all ranks,
and makes the host wait for earlier fetches. Here the host's work does not depend on the number of ranks, nothing is
copied, and only streams wait.

See traffic.py.
Source of what is replaced: deepspeed/runtime/zero/partitioned_param_coordinator.py, partition_parameters.py.

Tests: tests/distributed/test_gather.py, tests/gpu/test_emulated.py.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from megamtp.cluster.collectives import all_gather_single
from megamtp.engines.deepspeed.members import sharded


class Streams:
    """The streams of one device, or their absence on a CPU, where every operation is over when it returns.

    Attributes:
        compute: the stream that the model runs on.
    """

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.compute = torch.cuda.current_stream(device) if self.on_gpu else None
        self.gather = torch.cuda.Stream(device) if self.on_gpu else None
        self.scatter = torch.cuda.Stream(device) if self.on_gpu else None

    @contextlib.contextmanager
    def on(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """As torch.cuda.stream, without asking for the stream to come back to: it is known."""
        if stream is not None:
            torch.cuda.set_stream(stream)
        try:
            yield
        finally:
            if self.compute is not None:
                torch.cuda.set_stream(self.compute)

    def mark(self, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """A point in a stream's work."""
        return None if stream is None else stream.record_event()

    def wait_for(self, event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
        """Makes the stream wait, not the host."""
        if event is not None and stream is not None:
            stream.wait_event(event)

    def follow_compute(self, stream: torch.cuda.Stream | None) -> None:
        """Makes `stream` wait for all that the compute stream has been given."""
        if stream is not None and self.compute is not None:
            stream.wait_stream(self.compute)

    def keep_for_compute(self, tensor: Tensor) -> None:
        """A tensor of another stream: its memory is not used again before the compute stream is done with it."""
        if self.compute is not None:
            tensor.record_stream(self.compute)


@dataclass
class Buffer:
    """Memory for one module's weights: a flat, padded tensor for each parameter, the same as weights see them, and the
    event after which it may be overwritten."""

    flat: list[Tensor]
    weights: list[Tensor]
    last_use: torch.cuda.Event | None = None


class Unit:
    """A module whose parameters travel together.

    Attributes:
        parameters: all of them, in DeepSpeed's order; their gradients leave together.
        gathered, persistent: those that are whole only while they are needed, and those that stay so between a step's
            uses.
        shard_sizes, padding: of each parameter, a shard's elements, and how many of all shards' are not the
            parameter's.
        buffer: where the weights are, from the moment they are sent for.
        arriving: handles of the gather, until somebody has waited for them.
        arrived: of offloaded weights, after what else they need.
        pins: while above 0, the weights stay.
        ready: number of its parameters whose gradient is complete.
    """

    def __init__(self, module: nn.Module, world_size: int):
        self.module = module
        self.parameters = sorted(sharded(module.parameters()), key=lambda parameter: parameter.ds_id)
        self.gathered = [parameter for parameter in self.parameters if not parameter.ds_persist]
        self.persistent = [parameter for parameter in self.parameters if parameter.ds_persist]
        self.shard_sizes = [parameter.ds_tensor.numel() for parameter in self.parameters]
        self.padding = [
            size * world_size - parameter.ds_numel
            for size, parameter in zip(self.shard_sizes, self.parameters, strict=True)
        ]
        self.shapes = tuple(tuple(parameter.ds_shape) for parameter in self.gathered)
        self.buffer: Buffer | None = None
        self.arriving: list[dist.Work] = []
        self.arrived: torch.cuda.Event | None = None
        self.pins = self.ready = 0


class Gather:
    """Brings weights before a module needs them and lets them go after.

    The order in which modules need their weights is recorded in one pass; from then on the next `prefetch` modules'
    weights are always on their way. Training and evaluation have an order each, so neither disturbs the other's.
    Between the micro-batches of one step the weights do not change, and the end of the order is followed by its
    beginning.

    Memory is handed out with the event after which it may be overwritten, so the host never waits, and never runs so
    far ahead that memory grows.
    """

    def __init__(self, units: list[Unit], group: dist.ProcessGroup, streams: Streams, prefetch: int):
        self._units, self._group, self._streams, self._prefetch = units, group, streams, prefetch
        self._world_size, self._grouped = dist.get_world_size(group), dist.get_backend(group) != "gloo"
        self._free: dict[tuple, deque[Buffer]] = {}  # by the weights' shapes
        self._orders: dict[bool, list[Unit]] = {True: [], False: []}  # in training, in evaluation
        self._complete = {True: False, False: False}
        self._training, self._position = True, 0
        self._repeats = False  # whether another pass over the same weights follows the present one
        self._shown: list[Unit] = []
        self._nothing = torch.empty(0, dtype=units[0].parameters[0].dtype, device=streams.device)

    def start(self, training: bool, repeats: bool) -> None:
        """A forward pass begins, and the order of the last one is complete.

        Args:
            repeats: whether this is a micro-batch that another one of the same step will follow.
        """
        self._complete[self._training] = bool(self._orders[self._training])
        if not (self._repeats and training):
            self.release_all()
            self._streams.follow_compute(self._streams.gather)  # the optimizer may have changed the shards
        self._training, self._position, self._repeats = training, 0, repeats

    def end(self) -> None:
        """A backward pass is over: all weights go, unless they are there for the micro-batch that follows."""
        if not (self._repeats and self.is_complete_trace()):
            self.release_all()

    def is_complete_trace(self) -> bool:
        """Whether the order of the present kind of pass is known."""
        return self._complete[self._training]

    def fetch(self, unit: Unit) -> None:
        """Makes the current stream wait for the module's weights, and sends for those of the modules to come."""
        lacking = [parameter for parameter in unit.persistent if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if lacking:
            lacking[0].all_gather(lacking)
        self._follow(unit)
        self._send_for(unit)
        self._wait_for(unit)
        for following in self._following(unit):
            self._send_for(following)

    def show_shapes(self, unit: Unit) -> None:
        """For a backward pass that reads no weight, such as a lookup's: autograd only wants to see the gradient's
        shape.
        """
        if unit.buffer is not None:  # already there for the next micro-batch
            return
        for parameter in unit.gathered:
            parameter.data = torch.empty(1, dtype=parameter.dtype, device=self._streams.device).expand(
                parameter.ds_shape
            )
        self._shown.append(unit)

    def release(self, unit: Unit) -> None:
        """Lets the module's weights go, unless they are pinned or among the next two to be needed.

        Two, because the first layer's backward pass is followed by the embedding and the first layer.
        """
        if not (self.is_complete_trace() and unit in itertools.islice(self._ahead(), 2)):
            self._release(unit)

    @contextlib.contextmanager
    def pinned(self, unit: Unit) -> Iterator[None]:
        """Keeps a module's weights from their first use to the end of the block: one gather for all uses."""
        unit.pins += 1
        try:
            yield
        finally:
            unit.pins = max(0, unit.pins - 1)
            self._release(unit)

    def release_all(self, pinned: bool = False) -> None:
        """Lets all weights go; with `pinned`, also those that somebody wanted to keep."""
        self._repeats = False
        for unit in self._units:
            if pinned:
                unit.pins = 0
            self._release(unit)
        while self._shown:
            shown = self._shown.pop()
            if shown.buffer is None:
                self._hide(shown)

    def _follow(self, unit: Unit) -> None:
        """Moves on in the recorded order, or records from where a pass strays from it."""
        if self._next() is not unit:
            del self._orders[self._training][self._position :]
            self._orders[self._training].append(unit)
            self._complete[self._training] = False
        self._position += 1

    def _next(self) -> Unit | None:
        order = self._orders[self._training]
        return order[self._position] if self._position < len(order) else None

    def _ahead(self) -> Iterator[Unit]:
        """The rest of the order, and its beginning if that is what follows."""
        order = self._orders[self._training]
        yield from itertools.islice(order, self._position, None)
        if self._repeats:
            yield from order

    def _following(self, current: Unit) -> list[Unit]:
        """The next few modules other than the current one."""
        found: list[Unit] = []
        if not self.is_complete_trace():
            return found
        for unit in self._ahead():
            if len(found) == self._prefetch:
                break
            if unit is not current and unit not in found:
                found.append(unit)
        return found

    def _send_for(self, unit: Unit) -> None:
        if unit.buffer is not None:
            return
        shards = [parameter.ds_tensor for parameter in unit.gathered]
        with self._streams.on(self._streams.gather):
            offloaded = self._streams.on_gpu and bool(shards) and not shards[0].is_cuda
            if offloaded:
                shards = [shard.to(self._streams.device, non_blocking=True) for shard in shards]
            if self._world_size == 1 or not shards:
                weights = [shard.view(shape) for shard, shape in zip(shards, unit.shapes, strict=True)]
                unit.buffer = Buffer(shards, weights)
                for shard in shards if offloaded else ():
                    self._streams.keep_for_compute(shard)  # or the next copies might get its memory too early
            else:
                unit.buffer = self._take_buffer(unit, shards)
                self._streams.wait_for(unit.buffer.last_use, self._streams.gather)
                unit.arriving = self._gather(unit.buffer.flat, shards)
                for handle in unit.arriving if offloaded else ():
                    handle.wait()  # this stream, too: the next copies may get the memory of these
            if offloaded:
                unit.arrived = self._streams.mark(self._streams.gather)
        for parameter, weight in zip(unit.gathered, unit.buffer.weights, strict=True):
            parameter.data = weight
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def _gather(self, whole: list[Tensor], shards: list[Tensor]) -> list[dist.Work]:
        """One collective, or under gloo one for each parameter.

        torch's gloo notes the name of the work done last in a string that its two threads share without a lock. A name
        that does not fit into the string itself (over 15 characters) is then freed twice: ALLGATHER_COALESCED, sooner
        or later, crashes.
        """
        if self._grouped:
            return [self._group.allgather_into_tensor_coalesced(whole, shards)]
        pairs = zip(whole, shards, strict=True)
        return [all_gather_single(target, shard, group=self._group, async_op=True) for target, shard in pairs]

    def _take_buffer(self, unit: Unit, shards: list[Tensor]) -> Buffer:
        free = self._free.get(unit.shapes)
        if free:
            return free.popleft()
        # New memory belongs to the gathering stream: what other streams left unfinished in memory of theirs cannot
        # touch it.
        flat = [
            torch.empty(shard.numel() * self._world_size, dtype=shard.dtype, device=self._streams.device)
            for shard in shards
        ]
        weights = [
            tensor[: parameter.ds_numel].view(parameter.ds_shape)
            for tensor, parameter in zip(flat, unit.gathered, strict=True)
        ]
        return Buffer(flat, weights)

    def _wait_for(self, unit: Unit) -> None:
        for handle in unit.arriving:
            handle.wait()
        self._streams.wait_for(unit.arrived, self._streams.compute)
        unit.arriving, unit.arrived = [], None

    def _release(self, unit: Unit) -> None:
        if unit.buffer is None or unit.pins:
            return
        self._wait_for(unit)
        if self._world_size > 1 and unit.gathered:
            unit.buffer.last_use = self._streams.mark(self._streams.compute)
            self._free.setdefault(unit.shapes, deque()).append(unit.buffer)
        unit.buffer = None
        self._hide(unit)

    def _hide(self, unit: Unit) -> None:
        for parameter in unit.gathered:
            parameter.data = self._nothing
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
