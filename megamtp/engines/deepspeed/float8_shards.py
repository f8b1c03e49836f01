"""ZeRO-3's shards of weights that layers use in fp8: each rank quantises its own shards, and gathers move e4m3.

gather.py gathers them together with the other weights of their module. The parameters themselves then have a shape but
no memory; layers read the quantised copies.

Tests: tests/distributed/test_float8_layers.py.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamtp.engines.deepspeed.members import ShardedParameter, sharded
from megamtp.precision.operations import E4M3
from megamtp.precision.weights import WeightGroup, WeightQuantiser


class GroupShards:
    """This rank's shards of one group of weights.

    Attributes:
        parameters: the group's weights.
        sizes: bytes of a shard of each weight, with padding.
        memory: uint8: the shards, one behind the other.
    """

    def __init__(self, module: nn.Module, group: WeightGroup):
        self.group = group
        self.parameters = sharded(module.get_parameter(name) for name in group.names)
        self.sizes = [parameter.ds_tensor.numel() for parameter in self.parameters]
        device = self.parameters[0].ds_tensor.device
        on_host = torch.cuda.is_available() and device.type == "cpu"  # offloaded
        self.memory = torch.zeros(sum(self.sizes), dtype=torch.uint8, device=device, pin_memory=on_host)

    @property
    def shards(self) -> list[Tensor]:
        """Each weight's shard, uint8."""
        return list(self.memory.split(self.sizes))

    def num_matrices(self, num_gathered_bytes: int) -> int:
        """Returns 1 if the gathered weights are one matrix, with no padding between them; else one per weight."""
        is_padded = num_gathered_bytes != sum(parameter.ds_numel for parameter in self.parameters)
        return len(self.parameters) if is_padded else 1

    def matrices(self, flat: Sequence[Tensor], whole: Tensor) -> list[Tensor]:
        """Returns the gathered weights as e4m3 matrices.

        Args:
            flat: the gathered weights, uint8, flat and padded: pieces of `whole`.
        """
        width = self.parameters[0].ds_shape[1]
        if len(self.parameters) > 1 and self.num_matrices(whole.numel()) == 1:
            return [whole.view(E4M3).view(-1, width)]
        return [
            piece[: parameter.ds_numel].view(E4M3).view(parameter.ds_shape)
            for piece, parameter in zip(flat, self.parameters, strict=True)
        ]


def group_shards(module: nn.Module) -> list[GroupShards]:
    """Returns the shards of a module's weights in fp8; empty in other precisions."""
    groups: list[WeightGroup] = getattr(module, "weight_groups", [])
    return [GroupShards(module, group) for group in groups]


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
        shards.group.allocate(scale, shards.num_matrices(world_size * shards.memory.numel()), device)
    return lambda: quantiser.update(lambda amax: dist.all_reduce(amax, dist.ReduceOp.MAX, group=process_group))


def _num_elements(parameter: ShardedParameter, rank: int) -> int:
    """Returns the number of elements in a rank's shard, without padding."""
    size = parameter.ds_tensor.numel()
    return max(0, min(size, parameter.ds_numel - rank * size))
