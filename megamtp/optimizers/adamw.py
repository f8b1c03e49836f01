"""The AdamW optimizer.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

from collections.abc import Mapping

import torch
from torch import nn

from megamtp.config import OptimizerConfig
from megamtp.optimizers.base import OptimizerKind


class AdamW(OptimizerKind):
    """torch's fused AdamW, with weight decay for matrices and none for norms.

    On a CPU, torch's kernel rounds the last elements of a tensor, which do not fill a vector register (of at most 16
    floats), differently from the others. The last bits of an update therefore depend on where shards end.
    """

    tensors = ("exp_avg", "exp_avg_sq")

    @classmethod
    def make(
        cls, settings: OptimizerConfig, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]]
    ) -> torch.optim.AdamW:
        """Returns torch's AdamW; see OptimizerKind.make."""
        matrices = [parameter for name, parameter in parameters.items() if len(shapes[name]) > 1]
        vectors = [parameter for name, parameter in parameters.items() if len(shapes[name]) == 1]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
