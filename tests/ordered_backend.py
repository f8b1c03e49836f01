"""A torch.distributed backend that sums over the ranks in rank order, for any layout of the buffers.

gloo and NCCL sum in an order that depends on an element's position in the buffer, so two layouts of the same gradients
may differ in the last bit. With this backend the results must have the same bits; a difference is a defect.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class CompletedWork(dist.Work):
    def wait(self, timeout=None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class OrderedGroup(dist.ProcessGroup):
    """All collectives that the engines use, implemented with gloo's all-gather."""

    def __init__(self, store, rank: int, size: int, timeout):
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return "ordered"

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        pieces = [torch.empty_like(tensor) for _ in range(self._size)]
        self._gloo.allgather([pieces], [tensor.contiguous()]).wait()
        return pieces

    def _sum(self, tensor: Tensor) -> Tensor:
        first, *others = self._gather(tensor)
        for other in others:
            first = first + other
        return first

    def _allgather_base(self, output, tensor, opts=None):
        output.view(-1).copy_(torch.cat([piece.view(-1) for piece in self._gather(tensor)]))
        return CompletedWork()

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(self, outputs, tensors, opts=None):
        for output, tensor in zip(outputs, tensors, strict=True):
            self._allgather_base(output, tensor)
        return CompletedWork()

    def allgather(self, outputs, tensors, opts=None):
        for output, tensor in zip(outputs, tensors, strict=True):
            for place, piece in zip(output, self._gather(tensor), strict=True):
                place.copy_(piece)
        return CompletedWork()

    def _reduce_scatter_base(self, output, tensor, opts=None):
        output.view(-1).copy_(self._sum(tensor.view(-1)).chunk(self._size)[self._rank])
        return CompletedWork()

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(self, outputs, tensors, opts=None):
        for output, tensor in zip(outputs, tensors, strict=True):
            self._reduce_scatter_base(output, tensor)
        return CompletedWork()

    def allreduce(self, tensors, opts=None):
        for tensor in tensors:
            if opts is not None and opts.reduceOp != dist.ReduceOp.SUM:
                self._gloo.allreduce([tensor], opts).wait()
            else:
                tensor.copy_(self._sum(tensor))
        return CompletedWork()

    def broadcast(self, tensors, opts=None):
        self._gloo.broadcast(tensors, opts).wait()
        return CompletedWork()

    def barrier(self, opts=None):
        self._gloo.barrier().wait()
        return CompletedWork()


def register() -> None:
    dist.Backend.register_backend("ordered", OrderedGroup, devices=["cpu"])
