"""Initial weights, each drawn from (seed, its own name) alone: every engine, world size and cut starts bitwise alike.

Matrices: normal with standard deviation 0.02; the two projections that write to the residual stream (attention output,
SwiGLU down) are divided by sqrt(2 L) with L counting trunk and heads. Norms: 1. Source: Radford et al. 2019 (GPT-2),
section 2.3, in the form Megatron-LM uses (init_method_std 0.02, scaled_init_method_normal); the multi-token paper
prints no initialisation.
"""

import hashlib
import math

import torch
from torch import Tensor

from megamtp.config import ModelConfig

STANDARD_DEVIATION = 0.02


def initial_value(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """The fp32 CPU tensor that parameter `name` of MTPModel starts from."""
    if len(shape) == 1:
        return torch.ones(shape)
    deviation = STANDARD_DEVIATION
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        deviation /= math.sqrt(2 * model.num_layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)
