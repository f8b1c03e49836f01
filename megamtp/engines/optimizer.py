"""The optimizer of every engine."""

import torch
from torch import nn

from megamtp.config import Config
from megamtp.engines.head_phase import full_shape


def adamw(config: Config, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW; weight decay for matrices, none for norms.

    On a CPU torch's kernel rounds the last elements of a tensor, those that fill no vector register (16 floats at most), otherwise
    than the rest: where shards end decides about last bits.
    """
    settings = config.optimizer
    matrices = [parameter for parameter in model.parameters() if len(full_shape(parameter)) > 1]
    vectors = [parameter for parameter in model.parameters() if len(full_shape(parameter)) == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
