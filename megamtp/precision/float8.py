"""The products of a transformer layer in fp8: forward, and both products of backward.

All functions have the meaning of their namesakes in model/layers.py. They read a weight only through its quantised copy
(QuantisedWeights); the parameter itself receives the gradient, and may have no memory.

Norms, attention, rotary positions, the residual stream and all sums stay in 16 and 32 bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamtp.precision.operations import (
    E4M3,
    E5M2,
    norm_backward,
    norm_quantise,
    quantise_with_transpose,
    scaled_product,
    swiglu_backward,
    swiglu_quantise,
    transpose,
)

# Fast accumulation keeps some 14 bits of a sum. In the forward pass that is enough for sums over the width. In the
# backward pass it is not, although rounding to e5m2 is a larger error than accumulation. In 3,000 steps of a 0.3B model
# (tools/benchmark.py learning) the training loss of the last third was 0.46 % above that of bf16 with fast
# accumulation, and 0.19 % with exact accumulation, which costs 3 % of a layer's time.
FAST_FORWARD, FAST_BACKWARD = True, False


class QuantisedWeights(NamedTuple):
    """Weights that read the same input, in e4m3 with one scale.

    Attributes:
        matrices: all weights one below the other in one matrix, or a matrix for each.
        scale: fp32 [1, 1]; a weight is its matrix * scale.
    """

    matrices: tuple[Tensor, ...]
    scale: Tensor


def norm_linears(
    x_BTD: Tensor, norm_D: Tensor, weights: tuple[Tensor, ...], eps: float, quantised: QuantisedWeights
) -> tuple[Tensor, ...]:
    """Returns (x, y W_1^T, y W_2^T, ...) with y = rms_norm(x).

    x itself is returned so that backward adds its other gradients in the same kernel.
    """
    return _Float8NormLinears.apply(x_BTD, norm_D, eps, len(weights), *weights, quantised.scale, *quantised.matrices)


def linears(x: Tensor, weights: tuple[Tensor, ...], quantised: QuantisedWeights) -> tuple[Tensor, ...]:
    """Returns (x W_1^T, x W_2^T, ...)."""
    return _Float8Linears.apply(x, len(weights), *weights, quantised.scale, *quantised.matrices)


def add_norm_mlp(
    x_BTD: Tensor,
    added_BTD: Tensor,
    norm_D: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    quantised_gate_up: QuantisedWeights,
    quantised_down: QuantisedWeights,
) -> Tensor:
    """Returns h + down(silu(gate(y)) * up(y)) with h = x + added, y = rms_norm(h)."""
    return _Float8AddNormMlp.apply(
        x_BTD,
        added_BTD,
        norm_D,
        gate,
        up,
        down,
        eps,
        quantised_gate_up.scale,
        quantised_down.scale,
        *quantised_down.matrices,
        *quantised_gate_up.matrices,
    )


class _Float8NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, norm_D: Tensor, eps: float, num_weights: int, *weights_and_quantised: Tensor
    ) -> tuple[Tensor, ...]:
        weights = weights_and_quantised[:num_weights]
        weight_scale, *matrices = weights_and_quantised[num_weights:]
        x_ND = x_BTD.flatten(0, -2)
        _, normed8_ND, scale, reciprocal_rms_N = norm_quantise(x_ND, norm_D, eps)
        ctx.sizes = [len(weight) for weight in weights]
        outputs = _outputs(normed8_ND, scale, matrices, weight_scale, ctx.sizes, x_BTD.dtype)
        ctx.save_for_backward(x_BTD, norm_D, reciprocal_rms_N, normed8_ND, scale, weight_scale, *matrices)
        return x_BTD.view_as(x_BTD), *(output.view(*x_BTD.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx: Any, residual_BTD: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, norm_D, reciprocal_rms_N, normed8_ND, scale, weight_scale, *matrices = ctx.saved_tensors
        gradient8_NS, gradient8_SN, gradient_scale = quantise_with_transpose(
            [gradient.reshape(len(normed8_ND), -1) for gradient in gradients], E5M2
        )
        d_normed_ND = _input_gradient(gradient8_NS, gradient_scale, matrices, weight_scale, x_BTD.dtype)
        d_weights = _weight_gradients(
            gradient8_SN, gradient_scale, transpose([normed8_ND], gradient_scale), scale, ctx.sizes, x_BTD.dtype
        )
        d_x_ND, d_norm_D = norm_backward(
            d_normed_ND, x_BTD.flatten(0, -2), norm_D, reciprocal_rms_N, residual_BTD.reshape(d_normed_ND.shape)
        )
        return d_x_ND.view_as(x_BTD), d_norm_D, None, None, *d_weights, None, *[None] * len(matrices)


class _Float8Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_weights: int, *weights_and_quantised: Tensor) -> tuple[Tensor, ...]:
        weight_scale, *matrices = weights_and_quantised[num_weights:]
        ctx.sizes = [len(weight) for weight in weights_and_quantised[:num_weights]]
        x8_ND, x8_DN, scale = quantise_with_transpose([x.reshape(-1, x.shape[-1])], E4M3)
        ctx.save_for_backward(x8_DN, scale, weight_scale, *matrices)
        outputs = _outputs(x8_ND, scale, matrices, weight_scale, ctx.sizes, x.dtype)
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x8_DN, scale, weight_scale, *matrices = ctx.saved_tensors
        dtype = gradients[0].dtype
        gradient8_NS, gradient8_SN, gradient_scale = quantise_with_transpose(
            [gradient.reshape(x8_DN.shape[1], -1) for gradient in gradients], E5M2
        )
        d_x_ND = _input_gradient(gradient8_NS, gradient_scale, matrices, weight_scale, dtype)
        d_weights = _weight_gradients(gradient8_SN, gradient_scale, x8_DN, scale, ctx.sizes, dtype)
        return d_x_ND.view(*gradients[0].shape[:-1], -1), None, *d_weights, None, *[None] * len(matrices)


class _Float8AddNormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        added_BTD: Tensor,
        norm_D: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        eps: float,
        gate_up_scale: Tensor,
        down_scale: Tensor,
        down_matrix: Tensor,
        *gate_up_matrices: Tensor,
    ) -> Tensor:
        x_ND, normed8_ND, scale, reciprocal_rms_N = norm_quantise(
            x_BTD.flatten(0, -2), norm_D, eps, added_BTD.reshape(-1, len(norm_D))
        )
        sizes = [len(gate), len(up)]
        gate_NH, up_NH = _outputs(normed8_ND, scale, gate_up_matrices, gate_up_scale, sizes, x_BTD.dtype)
        hidden8_NH, hidden8_HN, hidden_scale = swiglu_quantise(gate_NH, up_NH)
        output_ND = scaled_product(hidden8_NH, hidden_scale, down_matrix, down_scale, x_BTD.dtype, FAST_FORWARD)
        ctx.save_for_backward(
            x_ND,
            norm_D,
            reciprocal_rms_N,
            normed8_ND,
            scale,
            gate_NH,
            up_NH,
            hidden8_HN,
            hidden_scale,
            gate_up_scale,
            down_scale,
            down_matrix,
            *gate_up_matrices,
        )
        return (x_ND + output_ND).view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, gradient_BTD: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_ND,
            norm_D,
            reciprocal_rms_N,
            normed8_ND,
            scale,
            gate_NH,
            up_NH,
            hidden8_HN,
            hidden_scale,
            gate_up_scale,
            down_scale,
            down_matrix,
            *gate_up_matrices,
        ) = ctx.saved_tensors
        dtype = x_ND.dtype
        gradient_ND = gradient_BTD.reshape(x_ND.shape)
        gradient8_ND, gradient8_DN, gradient_scale = quantise_with_transpose([gradient_ND], E5M2)
        d_hidden_NH = _input_gradient(gradient8_ND, gradient_scale, [down_matrix], down_scale, dtype)
        (d_down,) = _weight_gradients(gradient8_DN, gradient_scale, hidden8_HN, hidden_scale, [len(down_matrix)], dtype)
        d_gate_up8_NS, d_gate_up8_SN, d_gate_up_scale = swiglu_backward(d_hidden_NH, gate_NH, up_NH)
        d_normed_ND = _input_gradient(d_gate_up8_NS, d_gate_up_scale, gate_up_matrices, gate_up_scale, dtype)
        normed8_DN = transpose([normed8_ND], gradient_scale)
        d_gate, d_up = _weight_gradients(
            d_gate_up8_SN, d_gate_up_scale, normed8_DN, scale, [gate_NH.shape[1]] * 2, dtype
        )
        d_x_ND, d_norm_D = norm_backward(d_normed_ND, x_ND, norm_D, reciprocal_rms_N, gradient_ND)
        d_x_BTD = d_x_ND.view_as(gradient_BTD)
        return (d_x_BTD, d_x_BTD, d_norm_D, d_gate, d_up, d_down, *[None] * (4 + len(gate_up_matrices)))


def _outputs(
    x8_ND: Tensor,
    scale: Tensor,
    matrices: list[Tensor] | tuple[Tensor, ...],
    weight_scale: Tensor,
    sizes: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Returns x W^T [N, size] for each weight."""
    outputs = [scaled_product(x8_ND, scale, matrix, weight_scale, dtype, FAST_FORWARD) for matrix in matrices]
    return list(outputs[0].split(sizes, 1)) if len(outputs) < len(sizes) else outputs


def _input_gradient(
    gradient8_NS: Tensor,
    gradient_scale: Tensor,
    matrices: list[Tensor] | tuple[Tensor, ...],
    weight_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the gradient [N, D] with respect to the common input of weights whose outputs stand side by side."""
    weights8_DS = transpose(matrices, gradient_scale)
    return scaled_product(gradient8_NS, gradient_scale, weights8_DS, weight_scale, dtype, FAST_BACKWARD)


def _weight_gradients(
    gradient8_SN: Tensor, gradient_scale: Tensor, x8_DN: Tensor, scale: Tensor, sizes: list[int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Returns the gradient [size, D] of each weight."""
    return scaled_product(gradient8_SN, gradient_scale, x8_DN, scale, dtype, FAST_BACKWARD).split(sizes)
