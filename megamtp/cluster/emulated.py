"""Emulates a cluster of W ranks on one GPU. This process is rank 0; collectives take the predicted network time.

    python -m megamtp.pretrain configs/6.7b_n4.yaml cluster.emulate=64 cluster.flat_bandwidth=100e9 \\
        cluster.communication_sms=1 ...

This is a torch.distributed backend. Shards, memory, host work, streams and memory traffic are those of a real rank. An
all-gather writes its whole output (W copies of this rank's shard). A reduction reads its whole input and sums the W
pieces. The communication stream is then blocked until the network would have finished. The results are not those of
real training, so no checkpoint is written. On a CPU nothing is blocked, but every transfer is logged with its bytes
and predicted time.
"""

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, no_type_check

import torch
import torch.distributed as dist
from torch import Tensor

from megamtp.cluster.network import Network
from megamtp.config import ClusterConfig

BACKEND = "emulated"
MAX_LOGGED_TRANSFERS = 100_000
MAX_GRAPHS = 2048  # CUDA graphs of repeated transfers between the same addresses


@dataclass(frozen=True)
class EmulatedTransfer:
    """One collective.

    Attributes:
        kind: a key of network.PASSES.
        num_bytes: size of the whole tensors, not of a shard.
        seconds: predicted time on the network.
    """

    kind: str
    num_bytes: int
    seconds: float


class EmulatedWork(dist.Work):
    """Works like NCCL's: `wait` makes the current stream wait. It keeps a reference to the tensors until then."""

    def __init__(self, done: torch.cuda.Event | None, tensors: list[Tensor]):
        super().__init__()
        self._done, self._tensors = done, tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._done is not None:
            _current_stream().wait_event(self._done)
        self._tensors = []
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._done is None or self._done.query()


class EmulatedGroup(dist.ProcessGroup):
    """The process group of rank 0. It logs every collective in `transfers`.

    On a GPU a transfer runs several kernels per tensor. A transfer that repeats between the same addresses is captured
    as a CUDA graph, so that the host launches it once, like a collective of NCCL.
    """

    def __init__(self, network: Network, transfers: deque[EmulatedTransfer]):
        super().__init__(0, network.world_size)  # type: ignore[call-arg]  # the stub lacks this overload
        self._network, self._transfers = network, transfers
        self._size = network.world_size
        self._stream: torch.cuda.Stream | None = None
        # Graphs by transfer and addresses, least recently used first. None: the transfer has run once, without a graph.
        self._graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def pg_name(self) -> "dist.distributed_c10d.GroupName":
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> "dist.distributed_c10d.GroupName":
        return self.pg_name

    def _run(self, kind: str, whole: list[Tensor], others: list[Tensor], move: Callable[[], None]) -> EmulatedWork:
        """Moves the data on the communication stream and blocks that stream for the network's predicted time."""
        num_bytes = sum(tensor.nbytes for tensor in whole)
        transfer = EmulatedTransfer(kind, num_bytes, self._network.seconds(kind, num_bytes))
        self._transfers.append(transfer)
        if not whole or not whole[0].is_cuda:
            move()
            return EmulatedWork(None, [])
        if self._stream is None:
            self._stream, self._start = torch.cuda.Stream(), torch.empty(1, dtype=torch.int64, device="cuda")
        current = _current_stream()
        self._stream.wait_stream(current)
        torch.cuda.set_stream(self._stream)
        try:
            addresses = ((tensor.data_ptr(), tensor.numel(), tensor.dtype) for tensor in (*whole, *others))
            self._launch_or_replay(transfer, (kind, *addresses), move)
        finally:
            torch.cuda.set_stream(current)
        return EmulatedWork(self._stream.record_event(), [*whole, *others])

    def _launch_or_replay(self, transfer: EmulatedTransfer, key: tuple, move: Callable[[], None]) -> None:
        """Launches a transfer the first time, captures it as a graph the second time, and then replays the graph."""
        is_repeated = key in self._graphs
        graph = self._graphs.pop(key, None)
        if graph is None and is_repeated:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._launch(transfer, move)
            finally:
                graph.capture_end()
        if graph is None:
            self._launch(transfer, move)
        else:
            graph.replay()
        self._graphs[key] = graph  # the last key is the most recently used
        if len(self._graphs) > MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]  # CUDA frees a running graph when it ends

    def _launch(self, transfer: EmulatedTransfer, move: Callable[[], None]) -> None:
        mark(self._start)
        move()
        hold(self._start, transfer.seconds, self._network.cluster.communication_sms)

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: object = None
    ) -> EmulatedWork:
        def move() -> None:
            pairs = [_widened(tensor, output) for tensor, output in zip(tensors, outputs, strict=True)]
            shards = [shard.view(-1).expand(self._size, -1) for shard, _ in pairs]
            torch._foreach_copy_([whole.view(self._size, -1) for _, whole in pairs], shards)

        return self._run("all_gather", outputs, tensors, move)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: object = None) -> EmulatedWork:
        if _is_view_of(input, output):
            input = input.clone()
        return self.allgather_into_tensor_coalesced([output], [input])

    all_gather_single = _allgather_base

    def allgather(self, outputs: list[list[Tensor]], tensors: list[Tensor], opts: object = None) -> EmulatedWork:  # type: ignore[override]
        def move() -> None:
            for pieces, tensor in zip(outputs, tensors, strict=True):
                for piece in pieces:
                    piece.copy_(tensor)

        return self._run("all_gather", [piece for pieces in outputs for piece in pieces], tensors, move)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: object = None
    ) -> EmulatedWork:
        def move() -> None:
            for output, tensor in zip(outputs, tensors, strict=True):
                torch.sum(tensor.view(self._size, -1), dim=0, out=output.view(-1))

        return self._run("reduce_scatter", tensors, outputs, move)

    def _reduce_scatter_base(self, outputTensor: Tensor, inputTensor: Tensor, opts: object = None) -> EmulatedWork:
        def move() -> None:
            if _is_view_of(outputTensor, inputTensor):
                outputTensor.view(-1).copy_(inputTensor.reshape(self._size, -1).sum(dim=0))
            else:
                torch.sum(inputTensor.reshape(self._size, -1), dim=0, out=outputTensor.view(-1))

        return self._run("reduce_scatter", [inputTensor], [outputTensor], move)

    reduce_scatter_single = _reduce_scatter_base

    def allreduce(self, tensors: list[Tensor], opts: object = None) -> EmulatedWork:  # type: ignore[override]
        return self._run("all_reduce", tensors, [], lambda: None)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: object = None) -> EmulatedWork:  # type: ignore[override]
        return self._run("broadcast", tensors, [], lambda: None)

    def barrier(self, opts: object = None) -> EmulatedWork:
        return self._run("barrier", [], [], lambda: None)


def join(cluster: ClusterConfig) -> deque[EmulatedTransfer]:
    """Initialises torch.distributed as rank 0 of `cluster.emulate` ranks. Returns the log of transfers, oldest first.

    On a GPU this also makes a high-priority stream current. No other code gets this stream: torch has a pool of
    32 streams for each priority, and other code asks for other priorities.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    network = Network(cluster)
    transfers: deque[EmulatedTransfer] = deque(maxlen=MAX_LOGGED_TRANSFERS)
    if torch.cuda.is_available():
        # Emulated copies may use the whole GPU, whereas NCCL's kernels occupy a few multiprocessors. The priority lets
        # computation run first, as it would beside NCCL.
        torch.cuda.set_stream(torch.cuda.Stream(priority=-2))
    dist.Backend.register_backend(BACKEND, lambda *_: EmulatedGroup(network, transfers), devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=FakeStore(), rank=0, world_size=network.world_size)
    return transfers


def _widened(shard: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Returns fp8 data, which travel as bytes, as 16-bit numbers if possible: torch copies as many numbers a second.

    NCCL copies bytes as fast as other numbers.
    """
    if shard.dtype != torch.uint8 or any(x % 2 for x in (shard.numel(), shard.data_ptr(), whole.data_ptr())):
        return shard, whole
    return shard.view(torch.int16), whole.view(torch.int16)


def _is_view_of(shard: Tensor, whole: Tensor) -> bool:
    return whole.data_ptr() <= shard.data_ptr() < whole.data_ptr() + whole.nbytes


def _current_stream() -> torch.cuda.Stream:
    """Returns the current stream. Passes the device's index: a look-up would take time that real collectives do not."""
    return torch.cuda.current_stream(torch.cuda.current_device())


def mark(time: Tensor) -> Tensor:
    """Writes the time at which the current stream gets here to `time` (int64 [1], nanoseconds). Returns `time`."""
    _kernels()[0][(1,)](time, num_warps=1)
    return time


def hold(start: Tensor, seconds: float, num_sms: int) -> None:
    """Blocks the current stream and `num_sms` multiprocessors until `seconds` after the time `start` from `mark`.

    A single multiprocessor runs one waiting warp, which leaves room for other kernels. Several multiprocessors run 16
    warps each, which occupy the registers as NCCL's kernels do.
    """
    _kernels()[1][(num_sms,)](start, round(seconds * 1e9), num_warps=1 if num_sms == 1 else 16)


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """Returns the kernels of `mark` and `hold`.

    They read the GPU's nanosecond clock and not its cycle counter, because the length of a cycle changes with the load.
    """
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check
    def now():
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)

    @triton.jit
    @no_type_check
    def mark(time):
        tl.store(time, now())

    @triton.jit
    @no_type_check
    def hold(start, nanoseconds):
        end = tl.load(start) + nanoseconds
        while now() < end:
            pass

    return mark, hold
