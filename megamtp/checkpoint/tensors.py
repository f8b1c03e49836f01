"""Named tensors that are read by slices. Every checkpoint format is opened as a TensorSource."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

WEIGHT = "weight"  # the kind of the parameters' own tensors; other kinds are optimizer state, such as exp_avg


class TensorSource(Protocol):
    """Tensors on disk. Only the elements that are read are in memory.

    Attributes:
        shapes: the shapes of all tensors, by name.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Returns elements [start, end) of a flattened tensor (row-major); end=None: up to the last element.

        Raises:
            CheckpointError: the file is damaged.
        """


class InMemory:
    """A TensorSource over tensors in memory, by name."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = weights
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """See TensorSource.read. For a tensor that is not contiguous, copies only the rows with these elements."""
        weight = self.weights[name].detach()  # NumPy does not accept slices of a Parameter
        if weight.is_contiguous():
            return weight.view(-1)[start:end]
        start, end, _ = slice(start, end).indices(weight.numel())
        width = weight[0].numel()
        first = start // width
        return weight[first : -(-end // width)].reshape(-1)[start - first * width : end - first * width]


def read_tensor(source: TensorSource, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a whole tensor of `source` in its shape."""
    return source.read(name).view(source.shapes[name]).to(dtype)
