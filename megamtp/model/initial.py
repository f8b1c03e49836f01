"""Initial weights, the same bit for bit with every engine, number of ranks and pipeline partition.

Each parameter is drawn from (seed, name of the parameter) alone. Matrices are normal with standard deviation 0.02. The
two projections that write to the residual stream (attention output, SwiGLU down) are divided by sqrt(2 L), where L
counts trunk layers and heads. Norms start at 1.

Source: Radford et al. 2019 (GPT-2), section 2.3, in Megatron-LM's form (init_method_std 0.02,
scaled_init_method_normal). The multi-token paper does not state an initialisation.
"""

import hashlib
import math

import torch
from torch import Tensor

from megamtp.config import ModelConfig

STANDARD_DEVIATION = 0.02


def initial_value(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """Returns the initial value of the parameter `name` of MTPModel, as an fp32 CPU tensor."""
    if len(shape) == 1:
        return torch.ones(shape)
    deviation = STANDARD_DEVIATION
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        deviation /= math.sqrt(2 * model.num_layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)
