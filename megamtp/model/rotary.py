"""Rotary position embeddings: queries and keys are rotated by an angle that grows with the position.

Source: Su et al. 2021, arXiv:2104.09864, equation 34.

Tests: tests/unit/model/test_layers.py.
"""

import functools
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def rotary_tables(
    num_positions: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns (cos, sin), each [num_positions, head_dim], for pairs (k, k + K/2) as in transformers' Llama.

    Computed in fp32, because 16 bits cannot hold large positions exactly. Cached, because all layers of all
    micro-batches use the same tables.
    """
    with torch.inference_mode(False), torch.no_grad():
        frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(num_positions, device=device, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TK, sin_TK)
        first, second = x_BHTK.chunk(2, dim=-1)
        return x_BHTK * cos_TK + torch.cat((-second, first), dim=-1) * sin_TK

    @staticmethod
    def backward(ctx: Any, gradient_BHTK: Tensor) -> tuple[Tensor, None, None]:
        cos_TK, sin_TK = ctx.saved_tensors
        first, second = gradient_BHTK.chunk(2, dim=-1)
        return gradient_BHTK * cos_TK + torch.cat((second, -first), dim=-1) * sin_TK, None, None


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotates each pair (k, k + K/2) of queries or keys by the angle of its position.

    Backward rotates in the other direction, which torch.compile turns into one kernel. It needs several for torch's own
    gradient of `chunk` and `cat`.
    """
    return _Rotate.apply(x_BHTK, cos_TK, sin_TK)
