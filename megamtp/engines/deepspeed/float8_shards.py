"""ZeRO-3's shards of weights that layers use in fp8: each rank quantises its own shards, and gathers move e4m3.

gather.py gathers them together with the other weights of their module. The parameters themselves then have a shape, but
their data are NaN; layers read the quantised copies.

Tests: tests/distributed/test_float8_layers.py.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamtp.engines.deepspeed.members import ShardedParameter, sharded
from megamtp.model.layers import weight_groups
from megamtp.precision.operations import E4M3
from megamtp.precision.weights import WeightGroup, WeightQuantiser


class GroupShards:
    """This rank's shards of one group of weights.

    Attributes:
        parameters: the group's weights.
        sizes: bytes of a shard of each weight, with padding.
        memory: uint8: the shards, one behind the other.
        shards: each weight's shard, a view of `memory`.
    """

    def __init__(self, module: nn.Module, group: WeightGroup):
        self.group = group
        self.parameters = sharded(module.get_parameter(name) for name in group.names)
        self.sizes = [parameter.ds_tensor.numel() for parameter in self.parameters]
        device = self.parameters[0].ds_tensor.device
        on_host = torch.cuda.is_available() and device.type == "cpu"  # offloaded
        self.memory = torch.zeros(sum(self.sizes), dtype=torch.uint8, device=device, pin_memory=on_host)
        self.shards = list(self.memory.split(self.sizes))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each weight."""
        return tuple(tuple(parameter.ds_shape) for parameter in self.parameters)

    def is_one_matrix(self, world_size: int) -> bool:
        """Returns whether the gathered weights lie one below the other, without padding between them."""
        return world_size * self.memory.numel() == sum(parameter.ds_numel for parameter in self.parameters)

    def empty_gathered(self, world_size: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Returns memory for the gathered weights: (each flat and padded, uint8; the e4m3 matrices in it).

        Padded weights get memory of their own: fp8 products need matrices at addresses that are multiples of 16.
        """
        sizes = [size * world_size for size in self.sizes]
        if self.is_one_matrix(world_size):
            whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
            return list(whole.split(sizes)), [self.one_matrix(whole)]
        flat = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        matrices = [
            tensor[: parameter.ds_numel].view(E4M3).view(parameter.ds_shape)
            for tensor, parameter in zip(flat, self.parameters, strict=True)
        ]
        return flat, matrices

    def one_matrix(self, whole: Tensor) -> Tensor:
        """Returns the memory of all weights, without padding, as one e4m3 matrix."""
        return whole.view(E4M3).view(-1, self.parameters[0].ds_shape[1])


def group_shards(module: nn.Module) -> list[GroupShards]:
    """Returns the shards of a module's weights in fp8; empty in other precisions."""
    return [GroupShards(layer, group) for layer, group in weight_groups(module)]


def shard_quantiser(
    groups: Sequence[GroupShards], process_group: dist.ProcessGroup, device: torch.device
) -> Callable[[], None]:
    """Returns a collective function that quantises all shards of this rank, with scales that all ranks agree on."""
    if not groups:
        return lambda: None
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    sources, targets, indices = [], [], []
    for index, shards in enumerate(groups):
        for parameter, target in zip(shards.parameters, shards.shards, strict=True):
            size = _num_elements(parameter, rank)
            sources.append(parameter.ds_tensor.detach()[:size])
            targets.append(target[:size].view(E4M3))
            indices.append(index)
    quantiser = WeightQuantiser(sources, targets, indices, device)
    for scale, shards in zip(quantiser.scales, groups, strict=True):
        shards.group.allocate(scale, 1 if shards.is_one_matrix(world_size) else len(shards.parameters), device)
    return lambda: quantiser.update(lambda amax: dist.all_reduce(amax, dist.ReduceOp.MAX, group=process_group))


def _num_elements(parameter: ShardedParameter, rank: int) -> int:
    """Returns the number of elements in a rank's shard, without padding."""
    size = parameter.ds_tensor.numel()
    return max(0, min(size, parameter.ds_numel - rank * size))
