"""Weights in e4m3 with one scale per group, quantised once a step.

A group is the weights that read one input, such as query, key and value. The scale comes from the largest magnitude of
all their elements. Under ZeRO-3 each rank quantises only its own shards, so one all-reduce agrees on the scales of all
groups of the model.

Tests: tests/unit/precision/test_weights.py, tests/distributed/test_float8_layers.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megamtp.precision.float8 import QuantisedWeights
from megamtp.precision.operations import E4M3, LARGEST, MIN_AMAX

KERNEL_BLOCK, KERNEL_PROGRAMS = 4096, 256  # elements; programs for each tensor


class WeightGroup:
    """The quantised copies of one group of a layer's weights.

    Layers save `quantised` for their backward pass. Whoever moves the copies to other memory replaces the tensors'
    `data`; the tensors stay.

    Attributes:
        names: of the weights, in the layer.
        quantised: None until `allocate` is called.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.quantised: QuantisedWeights | None = None

    def allocate(self, scale: Tensor, num_matrices: int, device: torch.device) -> QuantisedWeights:
        """Makes `quantised` without memory: `num_matrices` is 1, or the number of weights."""
        matrices = tuple(torch.empty(0, dtype=E4M3, device=device) for _ in range(num_matrices))
        self.quantised = QuantisedWeights(matrices, scale)
        return self.quantised


class WeightQuantiser:
    """Quantises tensors of several groups, with a scale for each group.

    Args:
        sources: 16-bit tensors; each contiguous. They may be empty, and must stay where they are in memory.
        targets: e4m3 tensors with as many elements as the sources, on the same device; each contiguous.
        groups: index of each source's group, from 0.
        device: of the scales.

    Attributes:
        scales: fp32 [1, 1], one per group; they stay in place.
    """

    def __init__(
        self, sources: Sequence[Tensor], targets: Sequence[Tensor], groups: Sequence[int], device: torch.device
    ):
        self._sources, self._targets = list(sources), list(targets)
        self._group_of = list(groups)
        self._filled = [source for source in sources if source.numel()]
        filled_groups = [group for source, group in zip(sources, groups, strict=True) if source.numel()]
        self._filled_groups = torch.tensor(filled_groups, dtype=torch.int64, device=device)
        addresses = [tensor.data_ptr() for tensor in (*sources, *targets)]
        sizes = [source.numel() for source in sources]
        self._table = torch.tensor([*addresses, *sizes, *groups], device=device)
        # cuBLAS needs scales at addresses that are multiples of 16 bytes.
        self._scales = torch.ones(max(self._group_of) + 1, 4, dtype=torch.float32, device=device)
        self.scales = list(self._scales[:, :1].split(1))

    @torch.no_grad()
    def update(self, all_reduce_max: Callable[[Tensor], object] | None = None) -> None:
        """Quantises all sources with new scales.

        Args:
            all_reduce_max: collective; replaces a tensor by the largest values of all ranks.
        """
        amax = torch.zeros_like(self._scales[:, 0])
        if self._filled:
            largest = torch.stack(torch._foreach_norm(self._filled, float("inf"))).float().to(amax.device)
            amax.scatter_reduce_(0, self._filled_groups, largest, "amax")
        if all_reduce_max is not None:
            all_reduce_max(amax)
        amax.clamp_(min=MIN_AMAX)
        self._scales[:, 0].copy_(amax / LARGEST[E4M3])
        factors = LARGEST[E4M3] / amax
        if self._sources[0].is_cuda:
            self._run_kernel(factors)
            return
        host_factors = factors.to(self._sources[0].device)
        for source, target, group in zip(self._sources, self._targets, self._group_of, strict=True):
            target.copy_((source.float() * host_factors[group]).to(E4M3))

    def _run_kernel(self, factors: Tensor) -> None:
        import triton.language as tl

        from megamtp.precision import kernels

        types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
        kernels.quantise_tensors[(len(self._sources), KERNEL_PROGRAMS)](
            self._table,
            factors,
            len(self._sources),
            source_type=types[self._sources[0].dtype],
            target_type=tl.float8e4nv,
            block=KERNEL_BLOCK,
            num_warps=4,
        )


def quantiser_of(groups: Sequence[tuple[WeightGroup, Sequence[Tensor]]]) -> WeightQuantiser:
    """Returns a quantiser of whole weights [out, in], and gives each group one matrix with all of its weights.

    Args:
        groups: each group with its weights.
    """
    device = groups[0][1][0].device
    sources, targets, indices = [], [], []
    matrices = []
    for index, (_, weights) in enumerate(groups):
        matrix = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=E4M3, device=device)
        sources += [weight.detach() for weight in weights]
        targets += matrix.split([len(weight) for weight in weights])
        indices += [index] * len(weights)
        matrices.append(matrix)
    quantiser = WeightQuantiser(sources, targets, indices, device)
    for index, ((group, _), matrix) in enumerate(zip(groups, matrices, strict=True)):
        quantised = group.allocate(quantiser.scales[index], 1, device)
        quantised.matrices[0].data = matrix
    return quantiser
