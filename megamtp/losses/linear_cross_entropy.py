"""Unembedding and cross-entropy in one autograd function, chunk by chunk: logits never exist for more than `chunk_rows` rows.

The gradient of cross-entropy is known as soon as the logits are (softmax minus one-hot), so the forward pass computes the loss, dH
and dW from one visit of each chunk: three matrix products, nothing recomputed, nothing of size rows x V kept for backward.

Source: the gradient-in-forward idea is Liger-Kernel's (arXiv:2410.10989, section 3.2); accumulating dW over heads in fp32 is ours.
Shapes: N rows (positions), D width, V vocabulary, C rows of a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a target that counts for nothing; torch's own convention


class SharedGradient:
    """The fp32 sum of dW over the `num_uses` uses of one weight in one micro-batch.

    Heads add to it in turn; only the last use hands the sum to autograd, so it is rounded to the weight's dtype once and an
    engine sees one gradient, not n.
    """

    def __init__(self, num_uses: int):
        self.remaining_uses = num_uses
        self.total_VD: Tensor | None = None

    def buffer(self, weight_VD: Tensor) -> Tensor:
        if self.total_VD is None:
            self.total_VD = torch.zeros(weight_VD.shape, dtype=_wide(weight_VD.dtype), device=weight_VD.device)
        return self.total_VD

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
    z_loss: float = 0.0,
    chunk_rows: int = 4096,
    shared_gradient: SharedGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """scale * sum over rows of (-log softmax(H W^T)[target] + z_loss * logsumexp^2), and the bare sum of the first term.

    Args:
        hidden_ND: rows to project; bf16, fp16, fp32 or fp64. Sums run in fp32 (fp64 for fp64).
        weight_VD: the unembedding.
        targets_N: int64 in [0, V), or IGNORED.
        scale: factor of the loss, e.g. one over the global count of valid targets.
        seed: the gradient that backward will receive. It is multiplied in before anything is cast to 16 bits, so that fp16
            loss scaling protects what it is meant to protect; a different one in backward is still right, only rounded again.
        z_loss: coefficient of the squared log-partition function. Source: PaLM, arXiv:2204.02311, section 5.
        chunk_rows: rows whose logits are alive at a time (in fp32, and once more in 16 bits if the model is).
        shared_gradient: the accumulator of dW when the weight has several uses; None if this is the only one.

    Returns:
        (loss, nll_sum): scalars in fp32 (fp64 for fp64). Only `loss` is differentiable, with respect to hidden and weight, once.
    """
    # Asked here: inside an autograd function needs_input_grad is true even under no_grad.
    learning = torch.is_grad_enabled()
    sinks = _Sinks(
        torch.empty_like(hidden_ND) if learning and hidden_ND.requires_grad else None,
        (shared_gradient or SharedGradient(num_uses=1)) if learning and weight_VD.requires_grad else None,
    )
    options = _Options(scale, seed, z_loss, chunk_rows)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, options, sinks)


@dataclass(frozen=True)
class _Options:
    scale: float
    seed: float
    z_loss: float
    chunk_rows: int


@dataclass(frozen=True)
class _Sinks:
    """Where gradients go; None where none is wanted."""

    hidden_ND: Tensor | None
    weight: SharedGradient | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, options, sinks):
        nll_sum, z_sum = torch.zeros(2, dtype=_wide(hidden_ND.dtype), device=hidden_ND.device)
        for start in range(0, len(hidden_ND), options.chunk_rows):
            chunk_nll, chunk_z = _chunk(hidden_ND, weight_VD, targets_N, slice(start, start + options.chunk_rows), options, sinks)
            nll_sum += chunk_nll
            z_sum += chunk_z
        ctx.save_for_backward(sinks.hidden_ND)
        ctx.seed, ctx.shared_gradient, ctx.weight_dtype = options.seed, sinks.weight, weight_VD.dtype
        ctx.mark_non_differentiable(nll_sum)
        return options.scale * (nll_sum + options.z_loss * z_sum), nll_sum

    @staticmethod
    def backward(ctx, d_loss, _):
        (d_hidden_ND,) = ctx.saved_tensors
        d_weight_VD = ctx.shared_gradient.take_if_last() if ctx.shared_gradient else None
        factor = d_loss / ctx.seed  # exactly 1 in training, and then nothing changes
        if d_hidden_ND is not None:
            d_hidden_ND = (d_hidden_ND * factor).to(d_hidden_ND.dtype)
        if d_weight_VD is not None:
            d_weight_VD = (d_weight_VD * factor).to(ctx.weight_dtype)
        return d_hidden_ND, d_weight_VD, None, None, None


def _chunk(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: slice, options: _Options, sinks: _Sinks
) -> tuple[Tensor, Tensor]:
    """(summed nll, summed squared log-partition) of some rows; adds their gradients to the sinks. Its logits die with the call."""
    hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
    logits_CV = _wide_product(hidden_CD, weight_VD)
    nll_C, log_partition_C, valid_C = _negative_log_likelihood(logits_CV, targets_C)
    if sinks.hidden_ND is not None or sinks.weight:
        gradient_CV = _into_gradient(logits_CV, targets_C, log_partition_C, valid_C, options.scale * options.seed, options.z_loss)
        gradient_CV = gradient_CV.to(hidden_ND.dtype)
        del logits_CV
        if sinks.hidden_ND is not None:
            torch.mm(gradient_CV, weight_VD, out=sinks.hidden_ND[rows])
        if sinks.weight:
            _add_product(sinks.weight.buffer(weight_VD), gradient_CV.T, hidden_CD)
    return nll_C.sum(), (log_partition_C.square() * valid_C).sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _wide_product(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """H W^T with fp32 results; a GPU writes them straight from its fp32 accumulators."""
    if hidden_CD.is_cuda and hidden_CD.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden_CD, weight_VD.T, out_dtype=torch.float32)
    return torch.mm(hidden_CD, weight_VD.T).to(_wide(hidden_CD.dtype))


def _add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """total += left @ right in the total's precision."""
    if left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
    elif left_VC.is_cuda:
        torch.addmm(total_VD, left_VC, right_CD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD.addmm_(left_VC.to(total_VD.dtype), right_CD.to(total_VD.dtype))


def _negative_log_likelihood(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, log-partition, validity) of each row; overwrites the logits with softmax probabilities."""
    valid_C = targets_C != IGNORED
    target_logits_C = logits_CV.gather(1, targets_C.where(valid_C, 0)[:, None])[:, 0]
    largest_C = logits_CV.amax(dim=1)
    partition_C = logits_CV.sub_(largest_C[:, None]).exp_().sum(dim=1)
    log_partition_C = partition_C.log() + largest_C
    logits_CV.div_(partition_C[:, None])
    return (log_partition_C - target_logits_C).where(valid_C, 0.0), log_partition_C, valid_C


def _into_gradient(
    probabilities_CV: Tensor, targets_C: Tensor, log_partition_C: Tensor, valid_C: Tensor, factor: float, z_loss: float
) -> Tensor:
    """factor * d(nll + z_loss * log_partition^2)/d logits, in place."""
    factors_C = valid_C.to(probabilities_CV.dtype) * factor
    probabilities_CV.mul_((factors_C * (1 + 2 * z_loss * log_partition_C))[:, None])
    return probabilities_CV.scatter_add_(1, targets_C.where(valid_C, 0)[:, None], -factors_C[:, None])
