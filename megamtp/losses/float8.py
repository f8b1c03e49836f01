"""Two of the loss's three products in 8-bit floating point: logits H W^T, and dH = G W in the backward pass.

G is the gradient of the logits. The logits are products e4m3 x e4m3, dH is e5m2 x e4m3. The third product, dW, stays in
bf16.

H and W have one scale each, which maps the largest element to the largest e4m3 number. G lies in [-1, 1] before the
loss's factor is applied, so its scale is a constant. Finer-grained scales would gain nothing: e4m3 keeps its relative
precision from 2^-6 to 448 (without subnormal numbers), and elements below 1/28,000 of the largest element hardly
contribute.

G is in e5m2, which has only 2 mantissa bits but spans 30 powers of two, because most probabilities of a softmax are
tiny. e4m3 would round probabilities below 2^-18 to zero. This would bias the mean of dH over positions: by 20 % or more
at V = 32000, if one component of the unembedding's rows encodes how frequent each token is. The errors of e5m2 are
larger for a single position, but unbiased (tests/unit/losses/test_float8.py compares the two formats).

Source: Micikevicius et al. 2022, arXiv:2209.05433, for the formats and their use; DeepSeek-V3, arXiv:2412.19437,
section 3.3.2, for the 14-bit accumulation (see Float8Products.logits).
Shapes: [M, N] is any matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megamtp.precision.operations import E4M3, quantise

GRADIENT_SCALE = 2.0**12  # e5m2 then holds |G| from 2^-28 to 14; with z-loss |G| can exceed 1


class Float8Weight:
    """The unembedding in e4m3, made at its first use and shared by all uses in one micro-batch.

    Holds two copies, together 2 V D bytes, because fp8 products need their second factor contiguous along the
    summed dimension, which is D for the logits and V for dH.
    """

    def __init__(self) -> None:
        self.weight_VD: Tensor | None = None
        self.transposed_DV: Tensor | None = None
        self.scale: Tensor | None = None

    def products(self, weight_VD: Tensor, hidden_ND: Tensor, factor: float) -> "Float8Products":
        """Returns the fp8 products of one use of the weight.

        Args:
            factor: factor of the gradient with respect to the logits.
        """
        if self.weight_VD is None:
            self.transposed_DV = torch.empty(weight_VD.T.shape, dtype=E4M3, device=weight_VD.device)
            self.weight_VD, self.scale = quantise(weight_VD, transposed=self.transposed_DV)
        hidden8_ND, hidden_scale = quantise(hidden_ND)
        gradient_scale = torch.full((), factor / GRADIENT_SCALE, dtype=torch.float32, device=hidden_ND.device)
        return Float8Products(self, hidden8_ND, hidden_scale, gradient_scale, hidden_ND.dtype)


@dataclass(frozen=True)
class Float8Products:
    """The two fp8 products of one use of the weight, for all chunks of rows."""

    weight: Float8Weight
    hidden_ND: Tensor
    hidden_scale: Tensor
    gradient_scale: Tensor
    dtype: torch.dtype

    def logits(self, rows: slice) -> Tensor:
        """Returns the logits [C, V] of some rows, in the dtype of the unquantised hidden states.

        Uses the tensor cores' fast accumulation. It keeps some 14 bits of a sum, which is enough for D terms of similar
        size whose factors have 4 bits.
        """
        weight_VD, scale = self.weight.weight_VD, self.weight.scale
        assert weight_VD is not None and scale is not None
        return torch._scaled_mm(
            self.hidden_ND[rows],
            weight_VD.T,
            scale_a=self.hidden_scale,
            scale_b=scale,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )

    def hidden_gradient(self, gradient_CV: Tensor, out: Tensor) -> None:
        """Writes factor * gradient_CV / GRADIENT_SCALE @ weight to `out` [C, D].

        Does not use fast accumulation: one or two of the V terms are large, and 14 bits would truncate the many small
        terms, all in the same direction.
        """
        transposed_DV, scale = self.weight.transposed_DV, self.weight.scale
        assert transposed_DV is not None and scale is not None
        torch._scaled_mm(
            gradient_CV,
            transposed_DV.T,
            scale_a=self.gradient_scale,
            scale_b=scale,
            out_dtype=self.dtype,
            use_fast_accum=False,
            out=out,
        )
