"""Two of the loss's three products in 8-bit floating point: logits = H W^T in e4m3 x e4m3, dH = G W in e5m2 x e4m3.

H and W are scaled by one number each, which makes their largest element e4m3's; G, which lies in [-1, 1] before the
loss's factor comes in, by a constant. Finer scales would gain nothing: floating-point numbers keep their relative
precision over all of e4m3's 15 binades (2^-6 to 448 without subnormal numbers), and what is smaller than a 28,000th of
the largest element hardly counts.

G is in e5m2, of 2 bits but 30 binades, because much of a softmax is a tail of tiny probabilities. e4m3 rounds those
below 2^-18 to zero, which bends the mean of dH over positions, at V = 32000 by a fifth and more where the unembedding
has a direction for how frequent a token is; e5m2's errors, larger for a single position, go to both sides
(tests/unit/losses/test_float8.py compares them).

Source: the formats and their use: Micikevicius et al. 2022, arXiv:2209.05433; the 14 bits of Hopper's sums:
DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
Shapes: C rows of a chunk, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = 448.0  # of e4m3
SMALLEST_AMAX = 2.0**-100  # stands in for 0, by which nothing can be divided
GRADIENT_SCALE = 2.0**12  # reaches down to 2^-28, and up to 14 times what it would without z-loss
BLOCK = 128  # rows and columns of a kernel program's tile


class Float8Weight:
    """The unembedding in e4m3, shared by the uses of one micro-batch: made at the first, gone with this object.

    2 V D bytes: the fp8 products want their second factor with the summed dimension contiguous, which is D for logits
    and V for dH.
    """

    def __init__(self) -> None:
        self.rows_VD: Tensor | None = None
        self.columns_DV: Tensor | None = None
        self.scale: Tensor | None = None

    def products(self, weight_VD: Tensor, hidden_ND: Tensor, factor: float) -> "Float8Products":
        """Of one use, whose gradient with respect to logits is to be multiplied by `factor`."""
        if self.rows_VD is None:
            self.columns_DV = torch.empty(weight_VD.T.shape, dtype=WEIGHT, device=weight_VD.device)
            self.rows_VD, self.scale = quantise(weight_VD, transposed=self.columns_DV)
        hidden8_ND, hidden_scale = quantise(hidden_ND)
        gradient_scale = torch.full((), factor / GRADIENT_SCALE, dtype=torch.float32, device=hidden_ND.device)
        return Float8Products(self, hidden8_ND, hidden_scale, gradient_scale, hidden_ND.dtype)


@dataclass(frozen=True)
class Float8Products:
    """The two products of one use; what its chunks of rows have in common is made before the first of them."""

    weight: Float8Weight
    hidden_ND: Tensor
    hidden_scale: Tensor
    gradient_scale: Tensor
    dtype: torch.dtype

    def logits(self, rows: slice) -> Tensor:
        """[C, V] of some rows, in the dtype that hidden had.

        With the tensor cores' fast accumulation: it keeps some 14 bits of a sum, and D terms of like size, whose
        factors have 4, do not miss the others.
        """
        rows_VD, scale = self.weight.rows_VD, self.weight.scale
        assert rows_VD is not None and scale is not None
        return torch._scaled_mm(
            self.hidden_ND[rows],
            rows_VD.T,
            scale_a=self.hidden_scale,
            scale_b=scale,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )

    def hidden_gradient(self, gradient_CV: Tensor, out: Tensor) -> None:
        """out [C, D] = factor * gradient_CV / GRADIENT_SCALE @ weight.

        Without fast accumulation: one or two of V terms are large, and 14 bits would cut off the many small ones, all
        to one side.
        """
        columns_DV, scale = self.weight.columns_DV, self.weight.scale
        assert columns_DV is not None and scale is not None
        torch._scaled_mm(
            gradient_CV,
            columns_DV.T,
            scale_a=self.gradient_scale,
            scale_b=scale,
            out_dtype=self.dtype,
            use_fast_accum=False,
            out=out,
        )


def quantise(x_MN: Tensor, transposed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x / scale in e4m3, scale as an fp32 scalar on x's device), where scale makes x's largest element 448.

    Args:
        transposed: [N, M] in e4m3; receives the transpose of the result.
    """
    amax = torch.linalg.vector_norm(x_MN, float("inf"))
    if x_MN.is_cuda:
        return _triton(x_MN, amax, transposed)
    amax = amax.float().clamp(min=SMALLEST_AMAX)
    quantised_MN = (x_MN.float() * (LARGEST / amax)).to(WEIGHT)
    if transposed is not None:
        transposed.copy_(quantised_MN.T)
    return quantised_MN, amax / LARGEST


def _triton(x_MN: Tensor, amax: Tensor, transposed: Tensor | None) -> tuple[Tensor, Tensor]:
    from megamtp.losses import kernels

    quantised_MN = torch.empty_like(x_MN, dtype=WEIGHT)
    scale = torch.empty((), dtype=torch.float32, device=x_MN.device)
    rows, columns = x_MN.shape
    kernels.quantise[(-(-rows // BLOCK), -(-columns // BLOCK))](
        x_MN,
        amax,
        quantised_MN,
        transposed,
        scale,
        rows,
        columns,
        largest=LARGEST,
        smallest_amax=SMALLEST_AMAX,
        block=BLOCK,
        num_warps=8,
    )
    return quantised_MN, scale
