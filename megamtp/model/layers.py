"""One transformer layer of the Llama form: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from megamtp.config import ModelConfig
from megamtp.model.attention import DocumentMask, KeyValueCache, attention
from megamtp.model.rotary import rotary_tables
from megamtp.precision import float8
from megamtp.precision.float8 import QuantisedWeights
from megamtp.precision.weights import WeightGroup

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
# The weights that read one input, which fp8 quantises with one scale, in the order of QuantisedLayer.
WEIGHT_GROUPS = (WEIGHTS[1:4], WEIGHTS[4:5], WEIGHTS[6:8], WEIGHTS[8:9])
# (query, key and value; output; gate and up; down) in fp8
QuantisedLayer = tuple[QuantisedWeights, QuantisedWeights, QuantisedWeights, QuantisedWeights]


@dataclass(frozen=True)
class LayerOptions:
    """How layers run. None of these options changes the parameters.

    Attributes:
        recompute: activation checkpointing of trunk layers. Heads are never recomputed.
        compiled: run through torch.compile; all layers share one compiled function.
        float8: compute the products in fp8, from weights that WeightQuantiser has quantised.
        cuda_graphs: let torch.compile launch a layer's kernels as a CUDA graph. Weights are copied into the graph's
            memory, and outputs stay valid until the next micro-batch.
    """

    recompute: bool = False
    compiled: bool = False
    float8: bool = False
    cuda_graphs: bool = False


DEFAULT_OPTIONS = LayerOptions()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight over the last dimension. torch computes it in fp32, and on a GPU in one kernel."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2)


def linear(x: Tensor, weight: Tensor, quantised: QuantisedWeights | None = None) -> Tensor:
    """Returns x W^T, and saves the parameter itself for backward. (torch's linear saves a transposed view.)

    ZeRO-3 frees a parameter's memory after forward and gathers the weights into other memory for backward. A view would
    keep the old memory allocated or, if the engine reuses buffers, read the weights of another layer.
    tests/distributed/test_gather.py and tests/gpu/test_emulated.py fail with torch's linear.
    """
    return linears(x, (weight,), quantised)[0]


def linears(x: Tensor, weights: tuple[Tensor, ...], quantised: QuantisedWeights | None = None) -> tuple[Tensor, ...]:
    """Returns (x W_1^T, x W_2^T, ...); see linear."""
    if quantised is None:
        return tuple(_Linear.apply(x, weight) for weight in weights)
    return float8.linears(x, weights, quantised)


def norm_linears(
    x_BTD: Tensor, norm_D: Tensor, weights: tuple[Tensor, ...], eps: float, quantised: QuantisedWeights | None = None
) -> tuple[Tensor, ...]:
    """Returns (x, y W_1^T, y W_2^T, ...) with y = rms_norm(x). fp8 needs x among them: see float8.norm_linears."""
    if quantised is not None:
        return float8.norm_linears(x_BTD, norm_D, weights, eps, quantised)
    normed_BTD = rms_norm(x_BTD, norm_D, eps)
    return x_BTD, *(linear(normed_BTD, weight) for weight in weights)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Returns down(silu(gate(x)) * up(x)).

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def add_norm_mlp(
    x_BTD: Tensor,
    added_BTD: Tensor,
    norm_D: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    quantised_gate_up: QuantisedWeights | None = None,
    quantised_down: QuantisedWeights | None = None,
) -> Tensor:
    """Returns h + swiglu(rms_norm(h)) with h = x + added."""
    if quantised_gate_up is not None and quantised_down is not None:
        return float8.add_norm_mlp(x_BTD, added_BTD, norm_D, gate, up, down, eps, quantised_gate_up, quantised_down)
    x_BTD = x_BTD + added_BTD
    return x_BTD + swiglu(rms_norm(x_BTD, norm_D, eps), gate, up, down)


def transformer_layer(
    x_BTD: Tensor,
    weights: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
    eps: float,
    cache: KeyValueCache | None = None,
    mask: Tensor | BlockMask | None = None,
    quantised: QuantisedLayer | None = None,
    next_BTD: Tensor | None = None,
) -> tuple[Tensor, KeyValueCache]:
    """Returns (output, keys and values of all positions): output = h + swiglu(norm(h)), h = x + attention(norm(x)).

    Args:
        weights: in the order of WEIGHTS. They are arguments so that all layers share one compiled function.
        quantised: the same weights in fp8, which the products then use; None: compute in the weights' dtype.
        next_BTD: a second input of attention, which then reads [norm(next), norm(x)]. The norm of `next` is behind the
            other weights.
    """
    attention_norm, query, key, value, output, mlp_norm, gate, up, down, *next_norm = weights
    query_key_value8, output8, gate_up8, down8 = quantised or (None, None, None, None)
    if next_BTD is None:
        x_BTD, queries, keys, values = norm_linears(x_BTD, attention_norm, (query, key, value), eps, query_key_value8)
    else:
        inputs = torch.cat((rms_norm(next_BTD, next_norm[0], eps), rms_norm(x_BTD, attention_norm, eps)), dim=-1)
        queries, keys, values = linears(inputs, (query, key, value), query_key_value8)
    attended_BTD, cache = attention(queries, keys, values, rotary, head_dim, cache, mask)
    attended_BTD = linear(attended_BTD, output, output8)
    return add_norm_mlp(x_BTD, attended_BTD, mlp_norm, gate, up, down, eps, gate_up8, down8), cache


def layer_output(
    x_BTD: Tensor,
    weights: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
    head_dim: int,
    eps: float,
    mask: Tensor | BlockMask | None = None,
    quantised: QuantisedLayer | None = None,
    next_BTD: Tensor | None = None,
) -> Tensor:
    """Returns the layer's output without keys and values: the function that training compiles."""
    output_BTD, _ = transformer_layer(x_BTD, weights, rotary, head_dim, eps, None, mask, quantised, next_BTD)
    return output_BTD


@functools.cache
def compiled(function: Callable[..., Tensor], cuda_graphs: bool = False) -> Callable[..., Tensor]:
    """Returns the function with torch.compile applied, which compiles at the first call for each shape.

    Args:
        cuda_graphs: see LayerOptions.
    """
    # fullgraph: raise an error instead of running parts of the layer uncompiled.
    options: dict[str, Any] | None = {"triton.cudagraphs": True} if cuda_graphs else None
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


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
        float8_kept_bytes: saved instead with train.precision=fp8. None: the products then stay in 16 bits.
    """

    matrix_flops: int
    attention_flops: int
    kept_elements: int
    streamed_elements: int
    float8_kept_bytes: int | None = None

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.attention_flops


class NormWeight(nn.Module):
    """Holds the weight of an RMSNorm. rms_norm computes the norm."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))


class Float8Module(nn.Module):
    """A module whose products can run in fp8.

    Attributes:
        weight_groups: the quantised weights, if the module computes in fp8. Someone must quantise them before
            `forward`: see ModelPart.quantise_weights. ZeRO-3 does so with shards.
    """

    def __init__(self, names: Sequence[tuple[str, ...]], options: LayerOptions):
        super().__init__()
        self.weight_groups = [WeightGroup(names_of_group) for names_of_group in names if options.float8]

    @property
    def quantised(self) -> tuple[QuantisedWeights, ...] | None:
        """The weights in fp8, if the module computes in fp8: ZeRO-3 then gathers only these, not the parameters."""
        quantised = tuple(group.quantised for group in self.weight_groups)
        assert None not in quantised, "weights are not quantised"
        return cast(tuple[QuantisedWeights, ...], quantised) or None


def weight_groups(module: nn.Module) -> list[tuple[Float8Module, WeightGroup]]:
    """Returns the weights that a module and its submodules use in fp8, with their modules."""
    modules = [submodule for submodule in module.modules() if isinstance(submodule, Float8Module)]
    return [(submodule, group) for submodule in modules for group in submodule.weight_groups]


class TransformerLayer(Float8Module):
    """One transformer layer: a trunk layer, or a parallel head.

    `forward` applies activation checkpointing inside the module, so an engine's module hooks see one forward and one
    backward: a single gather serves recomputation and gradient.

    Args:
        attention_inputs: number of vectors of width D that queries, keys and values read.
    """

    parameter_order: tuple[str, ...] = WEIGHTS

    def __init__(self, model: ModelConfig, options: LayerOptions = DEFAULT_OPTIONS, attention_inputs: int = 1):
        super().__init__(WEIGHT_GROUPS, options)
        self.head_dim, self.theta, self.eps = model.head_dim, model.rope_theta, model.norm_eps
        self.options = options
        self._weights: tuple[Tensor, ...] | None = None
        input_dim = attention_inputs * model.dim
        key_value_dim = model.key_value_heads * model.head_dim
        self.attention_norm = NormWeight(model.dim)
        self.attention = nn.ModuleDict(
            {
                "query": nn.Linear(input_dim, model.dim, bias=False),
                "key": nn.Linear(input_dim, key_value_dim, bias=False),
                "value": nn.Linear(input_dim, key_value_dim, bias=False),
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
        """The layer's parameters in the order of `parameter_order`.

        Cached, because looking them up takes longer than a kernel launch. Comparing the first parameter is enough to
        notice new parameters: an engine that replaces parameters replaces all of a layer's.
        """
        if self._weights is None or self._weights[0] is not self.attention_norm.weight:
            self._weights = tuple(self.get_parameter(name) for name in self.parameter_order)
        return self._weights

    def cost(self, sequence_length: int) -> LayerCost:
        """Returns the forward cost of one position of a window of `sequence_length`. Norms count no operations.

        Source: Gloeckle et al. 2024, arXiv:2404.19737, table S5.
        """
        key_value_dim, input_dim = self.get_parameter("attention.key.weight").shape
        hidden_dim, dim = self.get_parameter("mlp.gate.weight").shape
        matrices = dim * dim + input_dim * (dim + 2 * key_value_dim) + 3 * dim * hidden_dim
        further = 2 * (input_dim - dim)  # a second input of attention, before and after its norm
        kept_elements = 6 * dim + 2 * key_value_dim + 3 * hidden_dim + further
        float8_bytes = 13 * dim + 6 * key_value_dim + 5 * hidden_dim + 2 * further
        return LayerCost(2 * matrices, 2 * sequence_length * dim, kept_elements, dim, float8_bytes)

    def forward(
        self, x_BTD: Tensor, document_mask: DocumentMask | None = None, next_BTD: Tensor | None = None
    ) -> Tensor:
        """Returns the layer's output [B, T, D].

        Args:
            document_mask: keeps attention inside documents; None: a position attends to all earlier positions.
            next_BTD: the second input of attention, if there are two.
        """
        function = compiled(layer_output, self.options.cuda_graphs) if self.options.compiled else layer_output
        mask, rotary = document_mask or (None, self._rotary(0, x_BTD))
        quantised = cast(QuantisedLayer | None, self.quantised)
        arguments = (x_BTD, self.weights, rotary, self.head_dim, self.eps, mask, quantised, next_BTD)
        if self.options.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def extend(
        self, x_BTD: Tensor, cache: KeyValueCache | None, next_BTD: Tensor | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """Returns the output for T positions that follow the cached positions, and the extended cache."""
        rotary = self._rotary(cache[0].shape[2] if cache else 0, x_BTD)
        return transformer_layer(x_BTD, self.weights, rotary, self.head_dim, self.eps, cache, next_BTD=next_BTD)

    def _rotary(self, past: int, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_tables(past + x_BTD.shape[1], self.head_dim, self.theta, x_BTD.device, x_BTD.dtype)
        return cos[past:], sin[past:]
