"""Named tensors read by slice: what every checkpoint format offers, and what every converter reads."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

WEIGHT = "weight"  # the kind of tensors beside which an optimizer's have their own names


class TensorSource(Protocol):
    """Tensors on disk, of which no more is in memory than what was asked for.

    Attributes:
        shapes: of every tensor, by name.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Elements start to end (without it, the last) of a tensor's row-major numbers, in a row: [end - start].

        Raises:
            CheckpointError: the file is damaged.
        """


class InMemory:
    """A TensorSource over tensors in memory: `weights` by name."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = weights
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read. Of a tensor that is not contiguous, only the rows with these elements are copied."""
        weight = self.weights[name].detach()  # a Parameter would give slices that NumPy refuses
        if weight.is_contiguous():
            return weight.view(-1)[start:end]
        start, end, _ = slice(start, end).indices(weight.numel())
        width = weight[0].numel()
        first = start // width
        return weight[first : -(-end // width)].reshape(-1)[start - first * width : end - first * width]


def whole(source: TensorSource, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor of `source` in its shape."""
    return source.read(name).view(source.shapes[name]).to(dtype)
