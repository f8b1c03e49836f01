"""The interface of an optimizer kind: it makes a torch optimizer and declares the state that it keeps."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from megamtp.config import OptimizerConfig

MASTER_BYTES = 4  # one fp32 element: of the master weights, or of a state tensor


class OptimizerKind:
    """A kind of elementwise optimizer: it updates a shard of a parameter as it would update the whole.

    `optimizer.kind` selects it: `adamw`, or MODULE:CLASS for a class in a module of your own.

    Attributes:
        tensors: names of the state tensors in torch's optimizer state. Each is fp32, has the parameter's shape, and
            starts at 0. The state also counts steps under "step".
    """

    tensors: ClassVar[tuple[str, ...]]

    @classmethod
    def make(
        cls, settings: OptimizerConfig, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]]
    ) -> torch.optim.Optimizer:
        """Returns the torch optimizer of the parameters.

        Args:
            parameters: by name; each may be a shard.
            shapes: shapes of the whole parameters, by name.
        """
        raise NotImplementedError

    @classmethod
    def state_bytes(cls) -> int:
        """Returns the bytes that a checkpoint holds per parameter: the fp32 weight and the optimizer state."""
        return MASTER_BYTES * (1 + len(cls.tensors))

    @classmethod
    def prepare(cls, state: dict[str, Tensor], weights: Tensor) -> None:
        """Initialises an empty optimizer state of `weights`, as the first step would."""
        if not state:
            state["step"] = torch.zeros((), device=weights.device)
            state |= {name: torch.zeros_like(weights.detach()) for name in cls.tensors}
