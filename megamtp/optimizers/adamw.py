"""AdamW. Source: Loshchilov and Hutter 2019, arXiv:1711.05101."""

from collections.abc import Mapping

import torch
from torch import nn

from megamtp.config import OptimizerConfig
from megamtp.optimizers.base import OptimizerKind


class AdamW(OptimizerKind):
    """torch's fused AdamW; weight decay for matrices, none for norms.

    On a CPU torch's kernel rounds the last elements of a tensor, those that fill no vector register (16 floats at
    most), in another way than the rest: where shards end decides about last bits.
    """

    tensors = ("exp_avg", "exp_avg_sq")

    @classmethod
    def make(
        cls, settings: OptimizerConfig, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]]
    ) -> torch.optim.AdamW:
        """See OptimizerKind.make."""
        matrices = [parameter for name, parameter in parameters.items() if len(shapes[name]) > 1]
        vectors = [parameter for name, parameter in parameters.items() if len(shapes[name]) == 1]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
