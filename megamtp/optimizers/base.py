"""What an optimizer kind is: how torch's optimizer is made, and what state it keeps."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from megamtp.config import OptimizerConfig

MASTER_BYTES = 4  # of a parameter's fp32 weight


class OptimizerKind:
    """A kind of optimizer, which works element by element: a shard of a parameter is updated as the whole would be.

    `optimizer.kind` names it: `adamw`, or MODULE:CLASS of a module of your own.

    Attributes:
        tensors: names, in torch's optimizer state, of its tensors: fp32, of the parameter's shape, 0 before the first
            step. Beside them it counts its steps under "step".
    """

    tensors: ClassVar[tuple[str, ...]]

    @classmethod
    def make(
        cls, settings: OptimizerConfig, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]]
    ) -> torch.optim.Optimizer:
        """torch's optimizer of the parameters.

        Args:
            shapes: of the whole parameters, by name; a parameter may be a shard.
        """
        raise NotImplementedError

    @classmethod
    def state_bytes(cls) -> int:
        """Bytes of a parameter's fp32 weight and optimizer state: what a checkpoint holds of it."""
        return MASTER_BYTES * (1 + len(cls.tensors))

    @classmethod
    def prepare(cls, state: dict[str, Tensor], weights: Tensor) -> None:
        """Fills an empty state of `weights` as the first step would."""
        if not state:
            state["step"] = torch.zeros((), device=weights.device)
            state |= {name: torch.zeros_like(weights.detach()) for name in cls.tensors}
