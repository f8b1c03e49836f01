"""Fused unembedding and cross-entropy: logits exist for at most `chunk_rows` rows (positions) at a time.

The gradient of cross-entropy with respect to the logits (softmax minus one-hot) is known as soon as the logits are. The
forward pass therefore computes the loss, dH and dW of a chunk of positions before it computes the next chunk: three
matrix products, no recomputation, and nothing of size N V saved for backward.

Source: Liger-Kernel (arXiv:2410.10989, section 3.2) also computes the gradient in forward. The fp32 sum of dW over the
heads is not from there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamtp.losses.float8 import GRADIENT_SCALE, Float8Products, Float8Weight
from megamtp.losses.softmax_gradient import negative_log_likelihood_, softmax_gradient_
from megamtp.precision.operations import E5M2

MAX_CHUNK_BYTES, MAX_CHUNK_ROWS = 2**29, 8192


class SharedGradient:
    """The fp32 sum of dW over the `num_uses` uses of one weight in one micro-batch.

    Each head adds its dW. Only the last use returns the sum to autograd, so it is rounded to the weight's dtype once,
    and an engine receives one gradient instead of n.
    """

    def __init__(self, num_uses: int):
        self.remaining_uses = num_uses
        self.total_VD: Tensor | None = None

    def add_product(self, left_VC: Tensor, right_CD: Tensor) -> None:
        """Adds left @ right to the sum, in fp32 (fp64 for fp64)."""
        self.total_VD = matmul_accumulate(left_VC, right_CD, self.total_VD)

    def take_if_last(self) -> Tensor | None:
        """Counts one use; returns the sum at the last use, else None."""
        self.remaining_uses -= 1
        if self.remaining_uses:
            return None
        total, self.total_VD = self.total_VD, None
        return total


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    scale: float = 1.0,
    loss_gradient: float = 1.0,
    loss_gradient_is_known: bool = False,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    shared_gradient: SharedGradient | None = None,
    float8_weight: Float8Weight | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (loss, nll_sum) with loss = scale * sum over rows of (nll + z_loss * logsumexp(logits)^2).

    The logits are H W^T, nll = -log softmax(logits)[target], and nll_sum is the sum of nll. A row whose target is
    IGNORED adds 0.

    Args:
        hidden_ND: rows to project; bf16, fp16, fp32 or fp64. Sums run in fp32 (fp64 for fp64).
        weight_VD: the unembedding.
        targets_N: int64 in [0, V), or IGNORED.
        scale: factor of the loss, e.g. 1 / number of valid targets in the global batch.
        loss_gradient: the gradient of the loss that backward is expected to receive, e.g. the fp16 loss scale. It
            multiplies gradients before they are cast to 16 bits, so that small gradients do not underflow. If
            backward receives another gradient, dH and dW are rescaled, which rounds them once more.
        loss_gradient_is_known: backward receives exactly `loss_gradient` and need not rescale. Saves a pass over dH.
        z_loss: coefficient of the squared log-partition function. Source: PaLM, arXiv:2204.02311, section 5.
        chunk_rows: number of rows whose logits exist at a time; None: default_chunk_rows. Memory per logit: on a GPU
            the model's dtype, plus fp32 in an evaluation; on a CPU fp32, plus the model's dtype if that has 16 bits.
        shared_gradient: accumulates dW if the weight has several uses; None if this is the only one.
        float8_weight: compute logits and dH in fp8 with these copies of the weight, which the first use makes. Needs
            hidden and weight in bf16, and D and V multiples of 16. Takes one more byte for each logit of a chunk and
            each element of hidden. Without gradients the loss stays in the model's dtype: evaluations are comparable.

    Returns:
        (loss, nll_sum): scalars in fp32 (fp64 for fp64). Only `loss` has a gradient. Backward may run only once.
    """
    # Read here: inside an autograd function needs_input_grad is true even under no_grad.
    needs_gradients = torch.is_grad_enabled()
    buffers = _GradientBuffers(
        torch.empty_like(hidden_ND) if needs_gradients and hidden_ND.requires_grad else None,
        (shared_gradient or SharedGradient(num_uses=1)) if needs_gradients and weight_VD.requires_grad else None,
    )
    chunk_rows = chunk_rows or default_chunk_rows(len(weight_VD), hidden_ND.element_size())
    options = _Options(scale, loss_gradient, loss_gradient_is_known, z_loss, chunk_rows)
    return _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, targets_N, options, buffers, float8_weight if buffers.any_needed else None
    )


@dataclass(frozen=True)
class _Options:
    scale: float
    loss_gradient: float
    loss_gradient_is_known: bool
    z_loss: float
    chunk_rows: int

    @property
    def logits_factor(self) -> float:
        """Factor of the gradient with respect to the logits."""
        return self.scale * self.loss_gradient


@dataclass(frozen=True)
class _GradientBuffers:
    """Where the forward pass writes dH and adds dW; None for a gradient that is not needed."""

    d_hidden_ND: Tensor | None
    d_weight: SharedGradient | None

    @property
    def any_needed(self) -> bool:
        return self.d_hidden_ND is not None or self.d_weight is not None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        options: _Options,
        buffers: _GradientBuffers,
        float8_weight: Float8Weight | None,
    ) -> tuple[Tensor, Tensor]:
        float8_products = (
            float8_weight.products(weight_VD, hidden_ND, options.logits_factor)
            if float8_weight and len(hidden_ND)
            else None
        )
        empty = torch.empty(2, 0, dtype=accumulation_dtype(hidden_ND.dtype), device=hidden_ND.device)
        chunks = [
            _run_chunk(
                hidden_ND,
                weight_VD,
                targets_N,
                slice(start, start + options.chunk_rows),
                options,
                buffers,
                float8_products,
            )
            for start in range(0, len(hidden_ND), options.chunk_rows)
        ]
        nll_N, squared_log_partition_N = map(torch.cat, zip(empty, *chunks, strict=True))
        nll_sum = nll_N.sum()
        loss = nll_sum + options.z_loss * squared_log_partition_N.sum() if options.z_loss else nll_sum
        ctx.save_for_backward(buffers.d_hidden_ND)
        ctx.options, ctx.d_weight, ctx.weight_dtype = options, buffers.d_weight, weight_VD.dtype
        ctx.mark_non_differentiable(nll_sum)
        return options.scale * loss, nll_sum

    @staticmethod
    def backward(
        ctx: Any, d_loss: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (d_hidden_ND,) = ctx.saved_tensors
        d_weight_VD = ctx.d_weight.take_if_last() if ctx.d_weight else None
        if not ctx.options.loss_gradient_is_known:
            factor = d_loss / ctx.options.loss_gradient  # exactly 1 in training, which changes no bit
            d_hidden_ND, d_weight_VD = (d if d is None else d.mul_(factor) for d in (d_hidden_ND, d_weight_VD))
        if d_weight_VD is not None:
            d_weight_VD = d_weight_VD.to(ctx.weight_dtype)
        return d_hidden_ND, d_weight_VD, None, None, None, None


def default_chunk_rows(vocab_size: int, bytes_per_logit: int) -> int:
    """Returns the largest power of two whose logits fit in half a GiB, at most 8192.

    More rows need fewer passes over dW, each of which reads 4 V D bytes and writes as many, but more
    memory. `python tools/benchmark.py loss` compares them: with V = 128256 an H100 would gain some 6 % from 8192 rows,
    whose logits take two GiB.
    """
    rows = MAX_CHUNK_ROWS
    while rows > 1 and rows * vocab_size * bytes_per_logit > MAX_CHUNK_BYTES:
        rows //= 2
    return rows


def _run_chunk(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    rows: slice,
    options: _Options,
    buffers: _GradientBuffers,
    float8_products: Float8Products | None,
) -> tuple[Tensor, Tensor]:
    """Writes the rows' gradients to the buffers; returns each row's (nll, squared log-partition).

    The logits are freed when the function returns.
    """
    hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
    logits_CV = float8_products.logits(rows) if float8_products else hidden_CD @ weight_VD.T
    if not hidden_CD.is_cuda:
        # The GPU kernel reads 16-bit logits and computes in fp32; torch's operations compute in the dtype they read.
        logits_CV = logits_CV.to(accumulation_dtype(logits_CV.dtype))
    if not buffers.any_needed:
        nll_C, log_partition_C, valid_C = negative_log_likelihood_(
            logits_CV.to(accumulation_dtype(logits_CV.dtype)), targets_C
        )
        return nll_C, log_partition_C.square() * valid_C
    needs_float8_gradient = float8_products and buffers.d_hidden_ND is not None
    float8_gradient_CV = torch.empty_like(logits_CV, dtype=E5M2) if needs_float8_gradient else None
    nll_C, squared_log_partition_C = softmax_gradient_(
        logits_CV, targets_C, options.logits_factor, options.z_loss, float8_gradient_CV, GRADIENT_SCALE
    )
    gradient_CV = logits_CV.to(hidden_ND.dtype)
    del logits_CV
    if float8_gradient_CV is not None:
        assert float8_products is not None and buffers.d_hidden_ND is not None
        float8_products.hidden_gradient(float8_gradient_CV, out=buffers.d_hidden_ND[rows])
    elif buffers.d_hidden_ND is not None:
        torch.mm(gradient_CV, weight_VD, out=buffers.d_hidden_ND[rows])
    if buffers.d_weight:
        buffers.d_weight.add_product(gradient_CV.T, hidden_CD)
    return nll_C, squared_log_partition_C


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which values of `dtype` are summed: fp64 for fp64, else fp32."""
    return dtype if dtype == torch.float64 else torch.float32


def matmul_accumulate(left: Tensor, right: Tensor, accumulator: Tensor | None) -> Tensor:
    """Returns accumulator + left @ right, computed in place; a new tensor if `accumulator` is None.

    The sum is in fp32 (fp64 for fp64). On a GPU, the kernel that multiplies 16-bit matrices also adds in fp32.
    """
    dtype = accumulation_dtype(left.dtype)
    if left.dtype == dtype or not left.is_cuda:
        left, right = left.to(dtype), right.to(dtype)
        return left @ right if accumulator is None else accumulator.addmm_(left, right)
    if accumulator is None:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.addmm(accumulator, left, right, out_dtype=dtype, out=accumulator)
