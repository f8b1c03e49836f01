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
# Names of a layer's parameters, in the order in which transformer_layer expects them.
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


class DocumentMask(NamedTuple):
    """Keeps attention inside the documents of a micro-batch, and counts positions from each document's start.

    documents.py makes it.

    Attributes:
        attention: bool [B, 1, T, T], true where a query attends to a key (last dimension); or a BlockMask for
            FlexAttention.
        rotary: (cos, sin) [B, 1, T, K] of each position within its document.
    """

    attention: Tensor | BlockMask
    rotary: tuple[Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight over the last dimension. torch computes it in fp32, and on a GPU in one kernel."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


@functools.lru_cache(maxsize=8)
def rotary_tables(
    num_positions: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns (cos, sin), each [num_positions, head_dim], for pairs (k, k + K/2) as in transformers' Llama.

    Computed in fp32, because 16 bits cannot hold large positions exactly. Cached, because all layers of all
    micro-batches use the same tables.

    Source: Su et al. 2021, arXiv:2104.09864, equation 34.
    """
    with torch.inference_mode(False), torch.no_grad():
        frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(num_positions, device=device, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotates each pair (k, k + K/2) of queries or keys by the angle of its position."""
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
    """Returns x W^T, and saves the parameter itself for backward. (torch's linear saves a transposed view.)

    ZeRO-3 frees a parameter's memory after forward and gathers the weights into other memory for backward. A view would
    keep the old memory allocated or, if the engine reuses buffers, read the weights of another layer.
    tests/distributed/test_gather.py and tests/gpu/test_emulated.py fail with torch's linear.
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
    """Computes causal self-attention, grouped-query if `key` and `value` have fewer rows than `query`.

    Args:
        query, key, value, output: weights [out, in].
        rotary: (cos, sin) [T, K] of the new positions, or [B, 1, T, K].
        cache: keys and values [B, H_kv, past, K] of earlier positions.
        mask: see DocumentMask.attention; None: a position attends to itself and all earlier positions.

    Returns:
        (output [B, T, D], keys and values [B, H_kv, past + T, K] of earlier and new positions).
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
        attended = flex_attention(queries, keys, values, block_mask=mask, enable_gqa=grouped)
    else:
        masking = _causal_masking(length, past, x_BTD.device) if mask is None else {"attn_mask": mask}
        attended = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped, **masking)
    return linear(attended.transpose(1, 2).reshape(batch, length, -1), output), (keys, values)


def _causal_masking(length: int, past: int, device: torch.device) -> dict:
    if past == 0:
        return {"is_causal": True}  # torch selects flash kernels by this flag, not by a causal mask
    return {"attn_mask": torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)}


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns down(silu(gate(x)) * up(x)).

    Source: Shazeer 2020, arXiv:2002.05202.
    """
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
    """Returns (output, keys and values of all positions): output = h + swiglu(norm(h)), h = x + attention(norm(x)).

    Args:
        weights: in the order of WEIGHTS. They are arguments so that all layers share one compiled function.
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
    """Returns the layer's output without keys and values: the function that training compiles."""
    return transformer_layer(x_BTD, weights, rotary, head_dim, eps, mask=mask)[0]


@functools.cache
def compiled_layer_output() -> Callable[..., Tensor]:
    """Returns layer_output with torch.compile applied, which compiles at the first call for each shape."""
    # fullgraph: raise an error instead of running parts of the layer uncompiled.
    return torch.compile(layer_output, dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class LayerCost:
    """The cost of a layer's or a head's forward pass for one position of a window.

    The backward pass takes twice as many floating-point operations.

    Attributes:
        matrix_flops: floating-point operations of products with weights.
        attention_flops: floating-point operations of attention; causal attention counts half of full attention.
        kept_elements: number of activation elements that are saved for the backward pass if nothing is recomputed. The
            coefficients of a built-in layer are fitted to the memory of steps in bf16.
        streamed_elements: elements of the residual stream at one position: D for a built-in layer. The planner
            multiplies them by the bytes that a built-in layer reads and writes per element, and divides by the memory
            bandwidth. That is the time of element-wise operations: norms, rotation, activation and sums.
    """

    matrix_flops: int
    attention_flops: int
    kept_elements: int
    streamed_elements: int

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.attention_flops


class NormWeight(nn.Module):
    """Holds the weight of an RMSNorm. rms_norm computes the norm."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))


class TransformerLayer(nn.Module):
    """One transformer layer: a trunk layer, or a parallel head.

    Args:
        recompute: activation checkpointing. `forward` applies it inside the module, so an engine's module hooks see one
            forward and one backward: a single gather serves recomputation and gradient.
        compiled: run through torch.compile; all layers share one compiled function.
    """

    def __init__(self, model: ModelConfig, recompute: bool = False, compiled: bool = False):
        super().__init__()
        self.head_dim, self.theta, self.eps = model.head_dim, model.rope_theta, model.norm_eps
        self.recompute, self.compiled = recompute, compiled
        self._weights: tuple[Tensor, ...] | None = None
        key_value_dim = model.key_value_heads * model.head_dim
        self.attention_norm = NormWeight(model.dim)
        self.attention = nn.ModuleDict(
            {
                "query": nn.Linear(model.dim, model.dim, bias=False),
                "key": nn.Linear(model.dim, key_value_dim, bias=False),
                "value": nn.Linear(model.dim, key_value_dim, bias=False),
                "output": nn.Linear(model.dim, model.dim, bias=False),
            }
        )
        self.mlp_norm = NormWeight(model.dim)
        self.mlp = nn.ModuleDict(
            {
                "gate": nn.Linear(model.dim, model.hidden_dim, bias=False),
                "up": nn.Linear(model.dim, model.hidden_dim, bias=False),
                "down": nn.Linear(model.hidden_dim, model.dim, bias=False),
            }
        )

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The layer's parameters in the order of WEIGHTS.

        Cached, because looking them up takes longer than a kernel launch. Comparing the first parameter is enough to
        notice new parameters: an engine that replaces parameters replaces all of a layer's.
        """
        if self._weights is None or self._weights[0] is not self.attention_norm.weight:
            self._weights = tuple(self.get_parameter(name) for name in WEIGHTS)
        return self._weights

    def cost(self, sequence_length: int) -> LayerCost:
        """Returns the forward cost of one position of a window of `sequence_length`. Norms count no operations.

        Source: Gloeckle et al. 2024, arXiv:2404.19737, table S5.
        """
        key_value_dim, dim = self.get_parameter("attention.key.weight").shape
        hidden_dim = len(self.get_parameter("mlp.gate.weight"))
        matrices = 2 * dim * dim + 2 * dim * key_value_dim + 3 * dim * hidden_dim
        kept_elements = 6 * dim + 2 * key_value_dim + 3 * hidden_dim
        return LayerCost(2 * matrices, 2 * sequence_length * dim, kept_elements, dim)

    def forward(self, x_BTD: Tensor, document_mask: DocumentMask | None = None) -> Tensor:
        """Returns the layer's output [B, T, D].

        Args:
            document_mask: keeps attention inside documents; None: a position attends to all earlier positions.
        """
        function = compiled_layer_output() if self.compiled else layer_output
        mask, rotary = document_mask or (None, self._rotary(0, x_BTD))
        arguments = (x_BTD, self.weights, rotary, self.head_dim, self.eps, mask)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def extend(self, x_BTD: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        """Returns the output for T positions that follow the cached positions, and the extended cache."""
        past = cache[0].shape[2] if cache else 0
        return transformer_layer(x_BTD, self.weights, self._rotary(past, x_BTD), self.head_dim, self.eps, cache)

    def _rotary(self, past: int, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_tables(past + x_BTD.shape[1], self.head_dim, self.theta, x_BTD.device, x_BTD.dtype)
        return cos[past:], sin[past:]
