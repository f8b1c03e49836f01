"""Unembedding and cross-entropy in one autograd function, chunk by chunk: logits never exist for more than `chunk_rows`
rows.

The gradient of cross-entropy is known as soon as the logits are (softmax minus one-hot), so the forward pass computes
the loss, dH and dW from one visit of each chunk: three matrix products, nothing recomputed, nothing of size rows x V
kept for backward.

Source: the gradient-in-forward idea is Liger-Kernel's (arXiv:2410.10989, section 3.2); accumulating dW over heads in
fp32 is ours. Shapes: N rows (positions), D width, V vocabulary, C rows of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamtp.losses.float8 import GRADIENT, GRADIENT_SCALE, Float8Products, Float8Weight
from megamtp.losses.softmax_gradient import negative_log_likelihood_, softmax_gradient_

MAX_CHUNK_BYTES, MAX_CHUNK_ROWS = 2**29, 8192


class SharedGradient:
    """The fp32 sum of dW over the `num_uses` uses of one weight in one micro-batch.

    Heads add to it in turn; only the last use hands the sum to autograd, so it is rounded to the weight's dtype once
    and an engine sees one gradient, not n.
    """

    def __init__(self, num_uses: int):
        self.remaining_uses = num_uses
        self.total_VD: Tensor | None = None

    def add_product(self, left_VC: Tensor, right_CD: Tensor) -> None:
        """total += left @ right, in fp32 (fp64 for fp64)."""
        self.total_VD = wide_product(left_VC, right_CD, add_to=self.total_VD)

    def take_if_last(self) -> Tensor | None:
        """Called once per use; the sum at the last one."""
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
    seed: float = 1.0,
    seed_is_certain: bool = False,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    shared_gradient: SharedGradient | None = None,
    float8_weight: Float8Weight | None = None,
) -> tuple[Tensor, Tensor]:
    """scale * sum over rows of (-log softmax(H W^T)[target] + z_loss * logsumexp^2), and the sum of its first term.

    Args:
        hidden_ND: rows to project; bf16, fp16, fp32 or fp64. Sums run in fp32 (fp64 for fp64).
        weight_VD: the unembedding.
        targets_N: int64 in [0, V), or IGNORED.
        scale: factor of the loss, e.g. one over the global count of valid targets.
        seed: the gradient that backward will receive. It is multiplied in before anything is cast to 16 bits, so that
            fp16 loss scaling protects what it is meant to protect; a different one in backward is still right, only
            rounded again.
        seed_is_certain: that backward receives no other than `seed`, which it then does not look at. Spares a pass over
            dH.
        z_loss: coefficient of the squared log-partition function. Source: PaLM, arXiv:2204.02311, section 5.
        chunk_rows: rows whose logits are alive at a time; None: see default_chunk_rows. On a GPU they are in the
            model's dtype, and in an evaluation in fp32 beside it; on a CPU in fp32, and once more in 16 bits if the
            model is.
        shared_gradient: the accumulator of dW when the weight has several uses; None if this is the only one.
        float8_weight: run logits and dH in fp8, with these copies of the weight, which are made if no earlier use has;
            hidden and weight in bf16, D and V multiples of 16. One byte more for each logit of a chunk, and for each
            element of hidden. Where nothing is to be learned the loss stays in the model's dtype, so that evaluations
            compare.

    Returns:
        (loss, nll_sum): scalars in fp32 (fp64 for fp64). Only `loss` is differentiable, with respect to hidden and
        weight, once.
    """
    # Asked here: inside an autograd function needs_input_grad is true even under no_grad.
    learning = torch.is_grad_enabled()
    sinks = _Sinks(
        torch.empty_like(hidden_ND) if learning and hidden_ND.requires_grad else None,
        (shared_gradient or SharedGradient(num_uses=1)) if learning and weight_VD.requires_grad else None,
    )
    chunk_rows = chunk_rows or default_chunk_rows(len(weight_VD), hidden_ND.element_size())
    options = _Options(scale, seed, seed_is_certain, z_loss, chunk_rows)
    return _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, targets_N, options, sinks, float8_weight if sinks.wanted else None
    )


@dataclass(frozen=True)
class _Options:
    scale: float
    seed: float
    seed_is_certain: bool
    z_loss: float
    chunk_rows: int

    @property
    def factor(self) -> float:
        """Of the gradient with respect to logits."""
        return self.scale * self.seed


@dataclass(frozen=True)
class _Sinks:
    """Where gradients go; None where none is wanted."""

    hidden_ND: Tensor | None
    weight: SharedGradient | None

    @property
    def wanted(self) -> bool:
        return self.hidden_ND is not None or self.weight is not None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        options: _Options,
        sinks: _Sinks,
        float8_weight: Float8Weight | None,
    ) -> tuple[Tensor, Tensor]:
        float8 = (
            float8_weight.products(weight_VD, hidden_ND, options.factor) if float8_weight and len(hidden_ND) else None
        )
        nothing = torch.empty(2, 0, dtype=wide(hidden_ND.dtype), device=hidden_ND.device)
        chunks = [
            _chunk(hidden_ND, weight_VD, targets_N, slice(start, start + options.chunk_rows), options, sinks, float8)
            for start in range(0, len(hidden_ND), options.chunk_rows)
        ]
        nll_N, squared_N = map(torch.cat, zip(nothing, *chunks, strict=True))
        nll_sum = nll_N.sum()
        loss = nll_sum + options.z_loss * squared_N.sum() if options.z_loss else nll_sum
        ctx.save_for_backward(sinks.hidden_ND)
        ctx.options, ctx.shared_gradient, ctx.weight_dtype = options, sinks.weight, weight_VD.dtype
        ctx.mark_non_differentiable(nll_sum)
        return options.scale * loss, nll_sum

    @staticmethod
    def backward(
        ctx: Any, d_loss: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (d_hidden_ND,) = ctx.saved_tensors
        d_weight_VD = ctx.shared_gradient.take_if_last() if ctx.shared_gradient else None
        if not ctx.options.seed_is_certain:
            factor = d_loss / ctx.options.seed  # exactly 1 in training, and then nothing changes
            d_hidden_ND, d_weight_VD = (d if d is None else d.mul_(factor) for d in (d_hidden_ND, d_weight_VD))
        if d_weight_VD is not None:
            d_weight_VD = d_weight_VD.to(ctx.weight_dtype)
        return d_hidden_ND, d_weight_VD, None, None, None, None


def default_chunk_rows(vocab_size: int, bytes_per_logit: int) -> int:
    """The largest power of two whose logits fit in half a GiB, at most 8192.

    More rows mean fewer passes over dW, each of which reads and writes 8 V D bytes, and more memory: tools/benchmark.py
    loss compares them. With V = 128256 an H100 would gain some 6 % from 8192 rows, two GiB of logits.
    """
    rows = MAX_CHUNK_ROWS
    while rows > 1 and rows * vocab_size * bytes_per_logit > MAX_CHUNK_BYTES:
        rows //= 2
    return rows


def _chunk(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    rows: slice,
    options: _Options,
    sinks: _Sinks,
    float8: Float8Products | None,
) -> tuple[Tensor, Tensor]:
    """(nll, squared log-partition) of each of some rows; adds their gradients to the sinks. Its logits die with the
    call.
    """
    hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
    logits_CV = float8.logits(rows) if float8 else hidden_CD @ weight_VD.T
    if not hidden_CD.is_cuda:
        logits_CV = logits_CV.to(
            wide(logits_CV.dtype)
        )  # torch's operations, unlike the kernel, compute in the dtype they are given
    if not sinks.wanted:
        nll_C, log_partition_C, valid_C = negative_log_likelihood_(logits_CV.to(wide(logits_CV.dtype)), targets_C)
        return nll_C, log_partition_C.square() * valid_C
    gradient8_CV = torch.empty_like(logits_CV, dtype=GRADIENT) if float8 and sinks.hidden_ND is not None else None
    nll_C, squared_C = softmax_gradient_(
        logits_CV, targets_C, options.factor, options.z_loss, gradient8_CV, GRADIENT_SCALE
    )
    gradient_CV = logits_CV.to(hidden_ND.dtype)
    del logits_CV
    if gradient8_CV is not None:
        assert float8 is not None and sinks.hidden_ND is not None
        float8.hidden_gradient(gradient8_CV, out=sinks.hidden_ND[rows])
    elif sinks.hidden_ND is not None:
        torch.mm(gradient_CV, weight_VD, out=sinks.hidden_ND[rows])
    if sinks.weight:
        sinks.weight.add_product(gradient_CV.T, hidden_CD)
    return nll_C, squared_C


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of sums over values of `dtype`."""
    return dtype if dtype == torch.float64 else torch.float32


def wide_product(left: Tensor, right: Tensor, add_to: Tensor | None) -> Tensor:
    """left @ right, plus `add_to`, in fp32 (fp64 for fp64); a GPU adds it inside its fp32 accumulators' last step."""
    dtype = wide(left.dtype)
    if left.dtype == dtype or not left.is_cuda:
        left, right = left.to(dtype), right.to(dtype)
        return left @ right if add_to is None else add_to.addmm_(left, right)
    if add_to is None:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.addmm(add_to, left, right, out_dtype=dtype, out=add_to)
