"""ZeRO-3's traffic with one collective per module and direction: whole weights in, gradients out, at a host cost that does not
depend on the number of ranks.

As shipped, DeepSpeed copies every fetched parameter together from one piece per rank, and every gradient apart into one, in Python
loops over all ranks; it also makes the host wait for earlier fetches. Here a grouped collective writes each parameter straight into
its weight and reads each gradient where it lies; only streams wait. `Gather` takes the place of DeepSpeed's parameter coordinator,
`Scatter` of its gradient buckets; both keep DeepSpeed's shards, optimizer, hooks and checkpoints as they are.

This file and head_phase.py are the only ones that know DeepSpeed's `ds_*` attributes. Checked against DeepSpeed 0.19.
Source of what is replaced: deepspeed/runtime/zero/partitioned_param_coordinator.py, stage3.py.
"""

import contextlib
from collections import deque
from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from megamtp.errors import InputError

SUPPORTED_DEEPSPEED = "0.19."
MAX_LEAVING = 2  # modules whose gradients may wait for their reduction; the device, not the host, waits for older ones


def check_deepspeed_version(version: str = deepspeed.__version__) -> None:
    """Raises: InputError if this is a DeepSpeed whose inner parts may be others than those replaced here."""
    if not version.startswith(SUPPORTED_DEEPSPEED):
        raise InputError(
            f"DeepSpeed {version} with engine.communication=grouped; expected {SUPPORTED_DEEPSPEED}*: install that, or set "
            "engine.communication=deepspeed"
        )


class Unit:
    """A module whose parameters travel together.

    Attributes:
        parameters: all of them, in DeepSpeed's order; their gradients leave together.
        gathered: those that are whole only while they are needed, which is all but persistent ones.
        weights: while gathered, one flat tensor per parameter, padded to a multiple of the world size.
        arriving: the gather's handle, until somebody has waited for it.
        pins: while above 0, the weights stay.
        ready: number of its parameters whose gradient is complete.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.parameters = sorted(module.parameters(), key=lambda parameter: parameter.ds_id)
        self.gathered = [parameter for parameter in self.parameters if not parameter.ds_persist]
        self.weights: list[Tensor] | None = None
        self.arriving: dist.Work | None = None
        self.pins = self.ready = 0

    def padded_sizes(self, world_size: int) -> tuple[int, ...]:
        return tuple(parameter.ds_tensor.ds_numel * world_size for parameter in self.gathered)


class WeightBuffers:
    """Memory for gathered weights, used again and again by modules of equal sizes.

    A buffer is handed out with the event after which it may be overwritten, so the host never waits, and never runs so far ahead
    that memory grows.
    """

    def __init__(self):
        self._free: dict[tuple, deque[tuple[list[Tensor], torch.cuda.Event | None]]] = {}

    def take(
        self, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """(flat tensors of these sizes, event to wait for). New ones belong to the current stream."""
        free = self._free.get((sizes, dtype))
        if free:
            return free.popleft()
        return [torch.empty(size, dtype=dtype, device=device) for size in sizes], None

    def give_back(self, tensors: list[Tensor], last_use: torch.cuda.Event | None) -> None:
        key = tuple(tensor.numel() for tensor in tensors), tensors[0].dtype
        self._free.setdefault(key, deque()).append((tensors, last_use))


class Streams:
    """The streams of one device, or their absence on a CPU, where every operation is over when it returns."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.gather = torch.cuda.Stream(device) if self.on_gpu else None
        self.scatter = torch.cuda.Stream(device) if self.on_gpu else None

    def on(self, stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(stream) if self.on_gpu else contextlib.nullcontext()

    def mark(self) -> torch.cuda.Event | None:
        """A point in the current stream's work."""
        return torch.cuda.current_stream(self.device).record_event() if self.on_gpu else None

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """Makes the current stream wait, not the host."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def follow_compute(self, stream: torch.cuda.Stream | None) -> None:
        """Makes `stream` wait for all that the current stream has been given."""
        if self.on_gpu:
            stream.wait_stream(torch.cuda.current_stream(self.device))


class Gather:
    """DeepSpeed's parameter coordinator, as far as its hooks call it: whole weights before a module runs, shards after.

    The order in which modules need their weights is recorded in one pass; from then on the next `prefetch` modules' weights are
    always on their way. Training and evaluation have an order each, so neither disturbs the other's.
    """

    hierarchy = 0  # DeepSpeed's depth of logging; it sets it

    def __init__(self, units: list[Unit], model: nn.Module, group: dist.ProcessGroup, streams: Streams, prefetch: int):
        self._model, self._group, self._streams, self._prefetch_units = model, group, streams, prefetch
        self._world_size = dist.get_world_size(group)
        self._units = {unit.module.ds_id: unit for unit in units}
        self._buffers = WeightBuffers()
        self._orders: dict[bool, list[Unit]] = {True: [], False: []}  # in training, in evaluation
        self._complete = {True: False, False: False}
        self._shown: list[Unit] = []
        self._training = True
        self._position = 0

    # What DeepSpeed's hooks call.

    def reset_step(self) -> None:
        """The start of a forward pass: the recorded order is complete, and the optimizer may have changed the shards."""
        self._complete[self._training] = bool(self._orders[self._training])
        self.release_backward_leftovers()
        self._training = self._model.training
        self._position = 0
        self._streams.follow_compute(self._streams.gather)

    def fetch_sub_module(self, module: nn.Module, forward: bool) -> None:
        """Makes the current stream wait for the module's weights, and sends for those of the modules to come."""
        unit = self._units.get(module.ds_id)
        if unit is None:
            return
        if isinstance(module, nn.Embedding) and not forward:
            self._show_shapes(unit)
            return
        lacking = [p for p in unit.parameters if p.ds_persist and p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if lacking:
            lacking[0].all_gather(lacking)
        self._follow(unit)
        self._send_for(unit)
        self._wait_for(unit)
        for following in self._following(unit):
            self._send_for(following)

    def release_sub_module(self, module: nn.Module, forward: bool = False) -> None:
        """Lets the module's weights go, unless they are pinned or the very next to be needed."""
        unit = self._units.get(module.ds_id)
        if unit and not (self.is_complete_trace() and self._next() is unit):
            self._release(unit)

    def release_backward_leftovers(self) -> None:
        """Lets all weights go that nothing pins."""
        for unit in self._units.values():
            self._release(unit)
        while self._shown:
            self._hide(self._shown.pop())

    def release_and_reset_all(self, module: nn.Module) -> None:
        """Lets all weights go, pinned and persistent ones too: around the optimizer's step, and after an interrupted one."""
        for unit in self._units.values():
            unit.pins = 0
        self.release_backward_leftovers()
        for parameter in module.parameters():
            if parameter.ds_persist:
                parameter.partition()

    def is_complete_trace(self) -> bool:
        """Whether the order of fetches of the present kind of pass is known."""
        return self._complete[self._training]

    def is_record_trace(self) -> bool:
        return False

    def is_invalid_trace(self) -> bool:
        return True

    def trace_prologue(self, module: nn.Module) -> None:
        """Nothing: fetch_sub_module follows the order itself."""

    # What the head phase calls.

    @contextlib.contextmanager
    def pinned(self, module: nn.Module) -> Iterator[None]:
        """Keeps a module's weights from their first use to the end of the block: one gather for all uses."""
        unit = self._units[module.ds_id]
        unit.pins += 1
        try:
            yield
        finally:
            unit.pins = max(0, unit.pins - 1)
            self._release(unit)

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

    def _following(self, current: Unit) -> list[Unit]:
        """The next few modules other than the current one."""
        found: list[Unit] = []
        if not self.is_complete_trace():
            return found
        order = self._orders[self._training]
        for place in range(self._position, len(order)):
            if len(found) == self._prefetch_units:
                break
            if order[place] is not current and order[place] not in found:
                found.append(order[place])
        return found

    def _send_for(self, unit: Unit) -> None:
        if unit.weights is not None:
            return
        if self._world_size == 1 or not unit.gathered:
            unit.weights = [parameter.ds_tensor.to(self._streams.device) for parameter in unit.gathered]
        else:
            dtype = unit.gathered[0].ds_tensor.dtype
            with self._streams.on(self._streams.gather):
                unit.weights, may_overwrite = self._buffers.take(unit.padded_sizes(self._world_size), dtype, self._streams.device)
                self._streams.wait_for(may_overwrite)
                # Only shards that are kept in CPU memory move here.
                shards = [parameter.ds_tensor.to(self._streams.device, non_blocking=True) for parameter in unit.gathered]
                unit.arriving = self._group.allgather_into_tensor_coalesced(unit.weights, shards)
        for parameter, whole in zip(unit.gathered, unit.weights, strict=True):
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def _wait_for(self, unit: Unit) -> None:
        if unit.arriving is not None:
            unit.arriving.wait()
            unit.arriving = None

    def _release(self, unit: Unit) -> None:
        if unit.weights is None or unit.pins:
            return
        self._wait_for(unit)
        if self._world_size > 1 and unit.gathered:
            self._buffers.give_back(unit.weights, self._streams.mark())
        unit.weights = None
        self._hide(unit)

    def _hide(self, unit: Unit) -> None:
        for parameter in unit.gathered:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._streams.device)
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE

    def _show_shapes(self, unit: Unit) -> None:
        """The backward pass of a lookup reads no weight, but autograd wants to see the shape that the gradient should have."""
        for parameter in unit.gathered:
            parameter.data = torch.empty(1, dtype=parameter.dtype, device=self._streams.device).expand(parameter.ds_shape)
        self._shown.append(unit)


class Scatter:
    """DeepSpeed's gradient buckets: sums a module's gradients over the ranks as soon as the last of them is there.

    Attributes:
        divides: whether the sum is turned into a mean here. For a power of two it is not: the division is then exact wherever it
            is done, and costs nothing in the factor of the loss (see ZeroEngine.train_batch). Otherwise each gradient is
            divided before the sum, as DeepSpeed does it: dividing after it would give other last digits.
    """

    def __init__(self, units: list[Unit], engine: DeepSpeedEngine, group: dist.ProcessGroup, streams: Streams):
        self._optimizer, self._group, self._streams = engine.optimizer, group, streams
        self._world_size = dist.get_world_size(group)
        self.divides = self._world_size & (self._world_size - 1) != 0
        self._dtype = engine.optimizer.communication_data_type
        self._unit_of = {parameter: unit for unit in units for parameter in unit.parameters}
        self._leaving: deque[tuple[torch.cuda.Event | None, list[Tensor]]] = deque()

    def add(self, parameter: nn.Parameter) -> None:
        """Called when backward has added to a gradient."""
        unit = self._unit_of[parameter]
        if getattr(parameter, "ds_grad_is_ready", True):
            unit.ready += 1
            if unit.ready == len(unit.parameters):
                self._send(unit)

    def end(self) -> None:
        """The end of a backward pass, and of an interrupted one: what was sent may be freed, what was not is dropped."""
        for unit in self._unit_of.values():
            unit.ready = 0
        self._leaving.clear()

    def _send(self, unit: Unit) -> None:
        unit.ready = 0
        gradients = [parameter.grad for parameter in unit.parameters]
        for parameter in unit.parameters:
            parameter.grad = None
        self._streams.follow_compute(self._streams.scatter)
        with self._streams.on(self._streams.scatter):
            whole = [
                self._padded(gradient.to(self._dtype), parameter)
                for gradient, parameter in zip(gradients, unit.parameters, strict=True)
            ]
            if self.divides:
                torch._foreach_div_(whole, self._world_size)
            shards = [torch.empty(tensor.numel() // self._world_size, dtype=tensor.dtype, device=tensor.device) for tensor in whole]
            self._group.reduce_scatter_tensor_coalesced(shards, whole).wait()
            self._optimizer.partition_grads(unit.parameters, self._without_padding(shards, unit))
            self._leaving.append((self._streams.mark(), [*gradients, *whole]))
        if len(self._leaving) > MAX_LEAVING:
            sent, _ = self._leaving.popleft()
            self._streams.wait_for(sent)  # from here on the allocator may reuse that memory

    def _padded(self, gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        missing = parameter.ds_tensor.ds_numel * self._world_size - parameter.ds_numel
        flat = gradient.reshape(-1)
        return nn.functional.pad(flat, (0, missing)) if missing else flat

    def _without_padding(self, shards: list[Tensor], unit: Unit) -> list[Tensor]:
        """The last rank's shard of a parameter may hold fewer real elements, or none."""
        rank = dist.get_rank(self._group)
        real = [
            max(0, min(shard.numel(), p.ds_numel - rank * shard.numel())) for shard, p in zip(shards, unit.parameters, strict=True)
        ]
        return [shard[:number] for shard, number in zip(shards, real, strict=True)]


class DeviceOrderedStream(torch.cuda.Stream):
    """A stream whose `synchronize` makes the device wait instead of the host.

    DeepSpeed synchronises its reduction stream at the end of every backward pass. What follows reads the gradients on the device
    alone, so an order among streams is enough, and the host may go on.
    """

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self)


class GroupedTraffic:
    """Gather and Scatter of one DeepSpeed ZeRO-3 engine; `remove` gives the engine its own parts back."""

    def __init__(self, engine: DeepSpeedEngine, modules: list[nn.Module], prefetch: int):
        check_deepspeed_version()
        self._engine, optimizer = engine, engine.optimizer
        device = torch.device(deepspeed.get_accelerator().current_device_name())
        streams, group = Streams(device), optimizer.dp_process_group
        units = [Unit(module) for module in modules]
        self.gather = Gather(units, engine.module, group, streams, prefetch)
        self.scatter = Scatter(units, engine, group, streams)
        self._coordinator = optimizer.parameter_offload.param_coordinator
        optimizer.parameter_offload.param_coordinator = self.gather
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = self.scatter.add
        self._epilogue = optimizer.independent_gradient_partition_epilogue
        optimizer.independent_gradient_partition_epilogue = self._end_backward
        self._stream = optimizer.reduce_and_partition_stream
        if streams.on_gpu and not optimizer.offload_optimizer:
            streams.scatter = optimizer.reduce_and_partition_stream = DeviceOrderedStream(device)

    def remove(self) -> None:
        """Restores DeepSpeed's own coordinator, buckets and stream."""
        optimizer = self._engine.optimizer
        self.gather.release_and_reset_all(self._engine.module)
        optimizer.parameter_offload.param_coordinator = self._coordinator
        optimizer.reduce_and_partition_stream = self._stream
        del optimizer.reduce_independent_p_g_buckets_and_remove_grads, optimizer.independent_gradient_partition_epilogue

    def _end_backward(self) -> None:
        self._epilogue()  # makes the current stream wait for the last reduction
        self.scatter.end()


def fill_shards(model: nn.Module, standard_deviation: float) -> None:
    """Values for an emulated cluster's one rank: of the right size, drawn without the peers that do not exist."""
    for parameter in model.parameters():
        if len(parameter.ds_shape) == 1:
            parameter.ds_tensor.fill_(1.0)
        else:
            parameter.ds_tensor.normal_(0.0, standard_deviation)
