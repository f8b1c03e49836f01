"""A loss that is spread by vocabulary: each rank holds a slice of the unembedding and computes that slice's logits.

    each slice: its logits; their largest, partition and target logit     -> exchange: log-partition, loss
    each slice: gradient of its logits, its dW, its share of dH           -> exchange: sum of dH

Ranks exchange three fp32 numbers per position and slice between the two halves, and dH after them. This file computes;
its caller communicates.

Source: Yeung et al. 2024, arXiv:2411.05288, section 4, algorithm 1.
"""

import torch
from torch import Tensor

from megamtp.losses.float8 import GRADIENT_SCALE, Float8Products
from megamtp.losses.linear_cross_entropy import accumulation_dtype, matmul_accumulate
from megamtp.losses.softmax_gradient import BLOCK_COLUMNS
from megamtp.precision.operations import E5M2
from megamtp.targets import IGNORED


def slice_statistics(
    hidden_ND: Tensor,
    weight_RD: Tensor,
    targets_N: Tensor,
    first_row: int,
    float8_products: Float8Products | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (logits [N, R], statistics [3, N]) of the slice that starts at `first_row` of the unembedding.

    The statistics, in fp32 (fp64 for fp64), are the largest logit, the sum of exp(logit - largest), and the target's
    logit, or 0 if the target is in another slice or IGNORED.

    Args:
        float8_products: the fp8 products of this slice and hidden; None: compute in hidden's dtype.
    """
    logits_NR = float8_products.logits(slice(None)) if float8_products else hidden_ND @ weight_RD.T
    slice_targets_N = _slice_targets(targets_N, first_row, len(weight_RD))
    if logits_NR.is_cuda and logits_NR.dtype != torch.float64:
        return logits_NR, _triton_statistics(logits_NR, slice_targets_N)
    values_NR = logits_NR.to(accumulation_dtype(logits_NR.dtype))
    largest_N = values_NR.amax(1)
    partition_N = (values_NR - largest_N[:, None]).exp().sum(1)
    target_logit_N = values_NR.gather(1, slice_targets_N.clamp(min=0)[:, None])[:, 0].where(slice_targets_N >= 0, 0.0)
    return logits_NR, torch.stack([largest_N, partition_N, target_logit_N])


def combine_statistics(statistics_S3N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (nll [N], log-partition [N]) from the statistics of all slices; nll is 0 where the target is IGNORED."""
    largest_SN, partition_SN, target_logit_SN = statistics_S3N.unbind(1)
    log_partition_N = torch.logsumexp(largest_SN + partition_SN.log(), 0)
    return (log_partition_N - target_logit_SN.sum(0)).where(targets_N != IGNORED, 0.0), log_partition_N


def slice_gradients(
    logits_NR: Tensor,
    hidden_ND: Tensor,
    weight_RD: Tensor,
    targets_N: Tensor,
    first_row: int,
    log_partition_N: Tensor,
    d_weight_RD: Tensor,
    factor: float = 1.0,
    z_loss: float = 0.0,
    float8_products: Float8Products | None = None,
) -> Tensor:
    """Returns this slice's share of dH [N, D] for the loss factor * sum of (nll + z_loss * log_partition^2).

    Adds dW of the slice to `d_weight_RD`, in fp32 (fp64 for fp64), and overwrites the logits.

    Args:
        float8_products: the products that computed the logits, made with the same factor; dH is then an fp8 product,
            too. None: compute in hidden's dtype.
    """
    slice_targets_N = _slice_targets(targets_N, first_row, len(weight_RD))
    valid_N = targets_N != IGNORED
    scale_N = (factor * (1 + 2 * z_loss * log_partition_N)).where(valid_N, 0.0)
    if logits_NR.is_cuda and logits_NR.dtype != torch.float64:
        _triton_gradient_(logits_NR, slice_targets_N, log_partition_N, scale_N, factor)
        gradient_NR = logits_NR
    else:
        values_NR = (logits_NR.to(log_partition_N.dtype) - log_partition_N[:, None]).exp_() * scale_N[:, None]
        in_slice_N = (slice_targets_N >= 0).to(values_NR.dtype)
        values_NR.scatter_add_(1, slice_targets_N.clamp(min=0)[:, None], -factor * in_slice_N[:, None])
        gradient_NR = logits_NR.copy_(values_NR)
    matmul_accumulate(gradient_NR.T, hidden_ND, d_weight_RD)
    if float8_products is None:
        return gradient_NR @ weight_RD
    d_hidden_ND = torch.zeros_like(hidden_ND)
    if factor:
        float8_gradient_NR = (gradient_NR * (GRADIENT_SCALE / factor)).to(E5M2)
        float8_products.hidden_gradient(float8_gradient_NR, out=d_hidden_ND)
    return d_hidden_ND


def _slice_targets(targets_N: Tensor, first_row: int, num_rows: int) -> Tensor:
    """Returns targets as rows of the slice; -1 for targets in another slice or IGNORED."""
    rows_N = targets_N - first_row
    return rows_N.where((rows_N >= 0) & (rows_N < num_rows) & (targets_N != IGNORED), -1)


def _triton_statistics(logits_NR: Tensor, slice_targets_N: Tensor) -> Tensor:
    from megamtp.losses import kernels

    statistics_3N = torch.empty(3, len(logits_NR), dtype=torch.float32, device=logits_NR.device)
    num_rows, num_columns = logits_NR.shape
    kernels.slice_statistics[(num_rows,)](
        logits_NR,
        slice_targets_N,
        statistics_3N,
        num_rows,
        num_columns,
        logits_NR.stride(0),
        block=BLOCK_COLUMNS,
        num_warps=16,
    )
    return statistics_3N


def _triton_gradient_(
    logits_NR: Tensor, slice_targets_N: Tensor, log_partition_N: Tensor, scale_N: Tensor, factor: float
) -> None:
    from megamtp.losses import kernels

    num_columns = logits_NR.shape[1]
    kernels.slice_gradient[(len(logits_NR),)](
        logits_NR,
        slice_targets_N,
        log_partition_N,
        scale_N,
        num_columns,
        logits_NR.stride(0),
        factor,
        block=BLOCK_COLUMNS,
        num_warps=16,
    )
