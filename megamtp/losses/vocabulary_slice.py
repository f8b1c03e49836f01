"""A loss spread by vocabulary: each of several ranks holds some rows of the unembedding and computes those columns of
the logits.

    each slice: logits, and their largest, partition and target's logit    -> exchange: log-partition, loss
    each slice: the gradient of its logits, its dW, its part of dH          -> exchange: the sum of dH

Three fp32 numbers per position and slice cross ranks between the two halves, and dH after them. This file computes; who
calls it exchanges. Source: Yeung et al. 2024, arXiv:2411.05288, section 4, algorithm 1.
Shapes: N positions, D width, R rows of a slice, S slices.
"""

import torch
from torch import Tensor

from megamtp.losses.float8 import GRADIENT, GRADIENT_SCALE, Float8Products
from megamtp.losses.linear_cross_entropy import wide, wide_product
from megamtp.losses.softmax_gradient import BLOCK
from megamtp.targets import IGNORED


def slice_statistics(
    hidden_ND: Tensor, weight_RD: Tensor, targets_N: Tensor, first: int, products: Float8Products | None = None
) -> tuple[Tensor, Tensor]:
    """(logits [N, R], statistics [3, N]) of the slice whose first row is row `first` of the unembedding.

    Statistics, in fp32 (fp64 for fp64): the largest logit, the sum of exp(logit - largest), and the target's logit, or
    0 if it lies in another slice or is IGNORED.

    Args:
        products: the products in fp8, of this slice and hidden; None: in hidden's dtype.
    """
    logits_NR = products.logits(slice(None)) if products else hidden_ND @ weight_RD.T
    own_targets_N = _own_targets(targets_N, first, len(weight_RD))
    if logits_NR.is_cuda and logits_NR.dtype != torch.float64:
        return logits_NR, _triton_statistics(logits_NR, own_targets_N)
    values_NR = logits_NR.to(wide(logits_NR.dtype))
    largest_N = values_NR.amax(1)
    partition_N = (values_NR - largest_N[:, None]).exp().sum(1)
    target_N = values_NR.gather(1, own_targets_N.clamp(min=0)[:, None])[:, 0].where(own_targets_N >= 0, 0.0)
    return logits_NR, torch.stack([largest_N, partition_N, target_N])


def combine(statistics_S3N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihoods [N], 0 where the target is IGNORED; log-partitions [N]) from the statistics of all
    slices.
    """
    largest_SN, partition_SN, target_SN = statistics_S3N.unbind(1)
    log_partition_N = torch.logsumexp(largest_SN + partition_SN.log(), 0)
    return (log_partition_N - target_SN.sum(0)).where(targets_N != IGNORED, 0.0), log_partition_N


def slice_gradients(
    logits_NR: Tensor,
    hidden_ND: Tensor,
    weight_RD: Tensor,
    targets_N: Tensor,
    first: int,
    log_partition_N: Tensor,
    sum_RD: Tensor,
    factor: float = 1.0,
    z_loss: float = 0.0,
    products: Float8Products | None = None,
) -> Tensor:
    """This slice's part of dH [N, D], of the loss factor * sum over positions of (nll + z_loss * log_partition^2).

    Adds the gradient of the slice to `sum_RD`, in fp32 (fp64 for fp64), and overwrites the logits.

    Args:
        products: those that made the logits, of the same factor: dH is then a product in fp8, too. None: in hidden's
            dtype.
    """
    own_targets_N = _own_targets(targets_N, first, len(weight_RD))
    valid_N = targets_N != IGNORED
    scale_N = (factor * (1 + 2 * z_loss * log_partition_N)).where(valid_N, 0.0)
    if logits_NR.is_cuda and logits_NR.dtype != torch.float64:
        _triton_gradient_(logits_NR, own_targets_N, log_partition_N, scale_N, factor)
        gradient_NR = logits_NR
    else:
        wide_NR = (logits_NR.to(log_partition_N.dtype) - log_partition_N[:, None]).exp_() * scale_N[:, None]
        here_N = (own_targets_N >= 0).to(wide_NR.dtype)
        wide_NR.scatter_add_(1, own_targets_N.clamp(min=0)[:, None], -factor * here_N[:, None])
        gradient_NR = logits_NR.copy_(wide_NR)
    wide_product(gradient_NR.T, hidden_ND, add_to=sum_RD)
    if products is None:
        return gradient_NR @ weight_RD
    d_hidden_ND = torch.zeros_like(hidden_ND)
    if factor:
        products.hidden_gradient((gradient_NR * (GRADIENT_SCALE / factor)).to(GRADIENT), out=d_hidden_ND)
    return d_hidden_ND


def _own_targets(targets_N: Tensor, first: int, rows: int) -> Tensor:
    """Targets counted from the slice's first row; -1 where they lie elsewhere or are IGNORED."""
    own_N = targets_N - first
    return own_N.where((own_N >= 0) & (own_N < rows) & (targets_N != IGNORED), -1)


def _triton_statistics(logits_NR: Tensor, own_targets_N: Tensor) -> Tensor:
    from megamtp.losses import kernels

    statistics_3N = torch.empty(3, len(logits_NR), dtype=torch.float32, device=logits_NR.device)
    num_rows, num_columns = logits_NR.shape
    kernels.slice_statistics[(num_rows,)](
        logits_NR, own_targets_N, statistics_3N, num_rows, num_columns, logits_NR.stride(0), block=BLOCK, num_warps=16
    )
    return statistics_3N


def _triton_gradient_(
    logits_NR: Tensor, own_targets_N: Tensor, log_partition_N: Tensor, scale_N: Tensor, factor: float
) -> None:
    from megamtp.losses import kernels

    num_columns = logits_NR.shape[1]
    kernels.slice_gradient[(len(logits_NR),)](
        logits_NR,
        own_targets_N,
        log_partition_N,
        scale_N,
        num_columns,
        logits_NR.stride(0),
        factor,
        block=BLOCK,
        num_warps=16,
    )
