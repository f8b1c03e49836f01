"""One transformer layer of the Llama form: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megamtp.config import ModelConfig

KeyValueCache = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 and returned in x's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as a function. fp32 inside, as Llama does: the mean of squares loses too much in 16 bits."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@functools.lru_cache(maxsize=8)
def rotary_tables(
    num_positions: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [num_positions, head_dim], of the two-halves form that transformers' Llama uses.

    Computed in fp32 (positions lose precision in 16 bits); cached, because every layer of every micro-batch asks for the same.
    Source: Su et al. 2021, arXiv:2104.09864, equation 34.
    """
    with torch.inference_mode(False), torch.no_grad():
        frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(num_positions, device=device, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotates each pair (k, k + K/2) of queries or keys by its position's angle."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK + torch.cat((-second, first), dim=-1) * sin_TK


class Attention(nn.Module):
    """Causal self-attention with rotary positions; fewer key/value heads than query heads if the model says so."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.head_dim, self.theta = model.head_dim, model.rope_theta
        key_value_dim = model.key_value_heads * model.head_dim
        self.query = nn.Linear(model.dim, model.dim, bias=False)
        self.key = nn.Linear(model.dim, key_value_dim, bias=False)
        self.value = nn.Linear(model.dim, key_value_dim, bias=False)
        self.output = nn.Linear(model.dim, model.dim, bias=False)

    def forward(self, x_BTD: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, KeyValueCache]:
        """-> (output [B, T, D], keys and values [B, H_kv, past + T, K] of all positions so far)."""
        batch, length, _ = x_BTD.shape
        past = cache[0].shape[2] if cache else 0
        cos, sin = rotary_tables(past + length, self.head_dim, self.theta, x_BTD.device, x_BTD.dtype)
        queries, keys, values = (
            projection(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        queries, keys = (rotate(part, cos[past:], sin[past:]) for part in (queries, keys))
        if cache:
            keys, values = torch.cat((cache[0], keys), dim=2), torch.cat((cache[1], values), dim=2)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, enable_gqa=keys.shape[1] != queries.shape[1], **_causal(length, past, x_BTD.device)
        )
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1)), (keys, values)


def _causal(length: int, past: int, device: torch.device) -> dict:
    if past == 0:
        return {"is_causal": True}  # the flag, not a mask, selects the flash kernels
    return {"attn_mask": torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(model.dim, model.hidden_dim, bias=False)
        self.up = nn.Linear(model.dim, model.hidden_dim, bias=False)
        self.down = nn.Linear(model.hidden_dim, model.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(.)): one trunk layer or the body of one head.

    `recompute` drops the activations and computes them again in backward. It is done inside `forward`, so that an
    engine's module hooks see one forward and one backward: one gather for both the recomputation and the gradient.
    """

    def __init__(self, model: ModelConfig, recompute: bool = False):
        super().__init__()
        self.attention_norm = RMSNorm(model.dim, model.norm_eps)
        self.attention = Attention(model)
        self.mlp_norm = RMSNorm(model.dim, model.norm_eps)
        self.mlp = SwiGLU(model)
        self.recompute = recompute

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layer, x_BTD, use_reentrant=False, preserve_rng_state=False)
        return self._layer(x_BTD)

    def _layer(self, x_BTD: Tensor) -> Tensor:
        return self.extend(x_BTD, None)[0]

    def extend(self, x_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """Decoding: the layer's output for T new positions behind the cached ones, and the longer cache."""
        attended, cache = self.attention(self.attention_norm(x_BTD), cache)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache
