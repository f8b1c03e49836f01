"""One transformer layer of the Llama form: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from megamtp.config import ModelConfig

KeyValueCache = tuple[Tensor, Tensor]
# A layer's parameters in the order in which transformer_layer takes them.
WEIGHTS = (
    "attention_norm.weight",
    "attention.query.weight",
    "attention.key.weight",
    "attention.value.weight",
    "attention.output.weight",
    "mlp_norm.weight",
    "mlp.gate.weight",
    "mlp.up.weight",
    "mlp.down.weight",
)


class Separation(NamedTuple):
    """Documents of a micro-batch's windows, each of which attention treats as if it were alone; documents.py makes it.

    mask: bool [B, 1, T, T], which keys (last) a query sees; or the same in blocks, for FlexAttention.
    rotary: (cos, sin) [B, 1, T, K] of each position within its document.
    """

    mask: Tensor | BlockMask
    rotary: tuple[Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. torch computes it in fp32 inside, and on a GPU in one kernel."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


@functools.lru_cache(maxsize=8)
def rotary_tables(
    num_positions: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [num_positions, head_dim], of the two-halves form that transformers' Llama uses.

    Computed in fp32 (positions lose precision in 16 bits); cached, because every layer of every micro-batch asks for
    the same. Source: Su et al. 2021, arXiv:2104.09864, equation 34.
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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T. Unlike torch's it keeps the parameter itself for backward, not a transposed view of what it held in
    forward.

    A sharded engine takes a parameter's memory away between forward and backward, and gives it other memory then; a
    view would keep the old memory alive, or, where memory is used again, read another layer's weights.
    tests/distributed/test_gather.py and tests/gpu/test_emulated.py notice.
    """
    return _Linear.apply(x, weight)


def attention(
    x_BTD: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
    cache: KeyValueCache | None = None,
    mask: Tensor | BlockMask | None = None,
) -> tuple[Tensor, KeyValueCache]:
    """Causal self-attention; fewer key/value heads than query heads if the weights say so.

    Args:
        query, key, value, output: weights [out, in].
        rotary: (cos, sin) [T, K] of the new positions, or [B, 1, T, K].
        mask: see Separation; None: all earlier positions are seen.
        cache: keys and values [B, H_kv, past, K] of earlier positions.

    Returns:
        (output [B, T, D], keys and values [B, H_kv, past + T, K] of all positions so far).
    """
    batch, length, _ = x_BTD.shape
    queries, keys, values = (
        linear(x_BTD, weight).view(batch, length, -1, head_dim).transpose(1, 2) for weight in (query, key, value)
    )
    queries, keys = rotate(queries, *rotary), rotate(keys, *rotary)
    past = 0
    if cache is not None:
        past = cache[0].shape[2]
        keys, values = torch.cat((cache[0], keys), dim=2), torch.cat((cache[1], values), dim=2)
    grouped = keys.shape[1] != queries.shape[1]
    if isinstance(mask, BlockMask):
        mixed = flex_attention(queries, keys, values, block_mask=mask, enable_gqa=grouped)
    else:
        seen = _causal(length, past, x_BTD.device) if mask is None else {"attn_mask": mask}
        mixed = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped, **seen)
    return linear(mixed.transpose(1, 2).reshape(batch, length, -1), output), (keys, values)


def _causal(length: int, past: int, device: torch.device) -> dict:
    if past == 0:
        return {"is_causal": True}  # the flag, not a mask, selects the flash kernels
    return {"attn_mask": torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)}


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv:2002.05202."""
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def transformer_layer(
    x_BTD: Tensor,
    weights: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
    eps: float,
    cache: KeyValueCache | None = None,
    mask: Tensor | BlockMask | None = None,
) -> tuple[Tensor, KeyValueCache]:
    """x + attention(norm(x)), then + mlp(norm(.)), and the keys and values of all positions.

    `weights` in the order of WEIGHTS. They are arguments, so that one compiled function serves all layers.
    """
    attention_norm, query, key, value, output, mlp_norm, gate, up, down = weights
    normed_BTD = rms_norm(x_BTD, attention_norm, eps)
    attended_BTD, cache = attention(normed_BTD, query, key, value, output, rotary, head_dim, cache, mask)
    x_BTD = x_BTD + attended_BTD
    return x_BTD + swiglu(rms_norm(x_BTD, mlp_norm, eps), gate, up, down), cache


def layer_output(
    x_BTD: Tensor,
    weights: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
    eps: float,
    mask: Tensor | BlockMask | None = None,
) -> Tensor:
    """transformer_layer without its keys and values, which training does not need: this is what is compiled."""
    return transformer_layer(x_BTD, weights, rotary, head_dim, eps, mask=mask)[0]


@functools.cache
def compiled_layer_output() -> Callable[..., Tensor]:
    """layer_output, compiled at its first call for each shape; an error, never a silent return to eager, if it
    cannot be.
    """
    return torch.compile(layer_output, dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class LayerCost:
    """What one position of a window costs in the forward pass of a layer or a head; the backward pass takes twice the
    operations.

    Attributes:
        matrix_flops: floating-point operations of products with weights.
        attention_flops: of attention; causal attention is counted at half.
        kept_elements: kept for the backward pass, without recomputation. Fitted to measured steps in bf16.
        streamed_elements: of the residual stream that norms, rotation, activation and sums read and write.
    """

    matrix_flops: int
    attention_flops: int
    kept_elements: int
    streamed_elements: int

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.attention_flops


class Norm(nn.Module):
    """Holds the weight of an RMSNorm."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))


class TransformerLayer(nn.Module):
    """The weights of one layer, a trunk layer or the body of one head, and their use.

    Args:
        recompute: drop the activations and compute them again in backward. It is done inside `forward`, so that an
            engine's module hooks see one forward and one backward: one gather for both the recomputation and the
            gradient.
        compiled: run through torch.compile; all layers share one compiled function.
    """

    def __init__(self, model: ModelConfig, recompute: bool = False, compiled: bool = False):
        super().__init__()
        self.head_dim, self.theta, self.eps = model.head_dim, model.rope_theta, model.norm_eps
        self.recompute, self.compiled = recompute, compiled
        self._weights: tuple[Tensor, ...] | None = None
        key_value_dim = model.key_value_heads * model.head_dim
        self.attention_norm = Norm(model.dim)
        self.attention = nn.ModuleDict(
            {
                "query": nn.Linear(model.dim, model.dim, bias=False),
                "key": nn.Linear(model.dim, key_value_dim, bias=False),
                "value": nn.Linear(model.dim, key_value_dim, bias=False),
                "output": nn.Linear(model.dim, model.dim, bias=False),
            }
        )
        self.mlp_norm = Norm(model.dim)
        self.mlp = nn.ModuleDict(
            {
                "gate": nn.Linear(model.dim, model.hidden_dim, bias=False),
                "up": nn.Linear(model.dim, model.hidden_dim, bias=False),
                "down": nn.Linear(model.hidden_dim, model.dim, bias=False),
            }
        )

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """In the order in which transformer_layer takes them.

        Kept, because looking them up takes longer than a launch. An engine that replaces parameters replaces all of a
        layer's.
        """
        if self._weights is None or self._weights[0] is not self.attention_norm.weight:
            self._weights = tuple(self.get_parameter(name) for name in WEIGHTS)
        return self._weights

    def cost(self, sequence_length: int) -> LayerCost:
        """What one position of a window of `sequence_length` costs in the forward pass.

        Source: paper.md, table S5: norms are not counted.
        """
        key_value_dim, dim = self.get_parameter("attention.key.weight").shape
        hidden_dim = len(self.get_parameter("mlp.gate.weight"))
        matrices = 2 * dim * dim + 2 * dim * key_value_dim + 3 * dim * hidden_dim
        kept_elements = 6 * dim + 2 * key_value_dim + 3 * hidden_dim
        return LayerCost(2 * matrices, 2 * sequence_length * dim, kept_elements, dim)

    def forward(self, x_BTD: Tensor, separation: Separation | None = None) -> Tensor:
        """`separation`: of the documents that the windows hold, where attention is to stay inside them."""
        function = compiled_layer_output() if self.compiled else layer_output
        rotary, mask = (separation.rotary, separation.mask) if separation else (self._rotary(0, x_BTD), None)
        arguments = (x_BTD, self.weights, rotary, self.head_dim, self.eps, mask)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def extend(self, x_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """Decoding: the layer's output for T new positions behind the cached ones, and the longer cache."""
        past = cache[0].shape[2] if cache else 0
        return transformer_layer(x_BTD, self.weights, self._rotary(past, x_BTD), self.head_dim, self.eps, cache)

    def _rotary(self, past: int, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_tables(past + x_BTD.shape[1], self.head_dim, self.theta, x_BTD.device, x_BTD.dtype)
        return cos[past:], sin[past:]
