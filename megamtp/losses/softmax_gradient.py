"""Overwrites logits with the gradient of cross-entropy with respect to them, and returns each row's loss.

On a GPU one kernel reads each row from memory once and writes it once. On a CPU torch's operations compute the same.
"""

import torch
from torch import Tensor

from megamtp.targets import IGNORED

BLOCK_COLUMNS = 16384  # columns that a kernel program holds in registers


def softmax_gradient_(
    logits_CV: Tensor,
    targets_C: Tensor,
    factor: float,
    z_loss: float,
    copy_CV: Tensor | None = None,
    copy_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Overwrites `logits_CV` with factor * d(nll + z_loss * log_partition^2)/d logits.

    Rows whose target is IGNORED become 0.

    Args:
        copy_CV: receives the same gradient with `copy_factor` instead of `factor`, in its own dtype.

    Returns:
        (nll, squared log-partition): [C] in fp32 (fp64 for fp64), both 0 where the target is IGNORED.
    """
    if logits_CV.is_cuda and logits_CV.dtype != torch.float64:
        return _triton(logits_CV, targets_C, factor, z_loss, copy_CV, copy_factor)
    nll_C, log_partition_C, valid_C = negative_log_likelihood_(logits_CV, targets_C)
    valid_factor_C = valid_C.to(logits_CV.dtype)
    logits_CV.mul_((valid_factor_C * (1 + 2 * z_loss * log_partition_C))[:, None])
    logits_CV.scatter_add_(1, targets_C.where(valid_C, 0)[:, None], -valid_factor_C[:, None])
    if copy_CV is not None:
        copy_CV.copy_(logits_CV * copy_factor)
    logits_CV.mul_(factor)
    return nll_C, log_partition_C.square() * valid_C


def negative_log_likelihood_(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites the logits with softmax probabilities; returns each row's (nll, log-partition, target is valid)."""
    valid_C = targets_C != IGNORED
    target_logits_C = logits_CV.gather(1, targets_C.where(valid_C, 0)[:, None])[:, 0]
    largest_C = logits_CV.amax(dim=1)
    partition_C = logits_CV.sub_(largest_C[:, None]).exp_().sum(dim=1)
    log_partition_C = partition_C.log() + largest_C
    logits_CV.div_(partition_C[:, None])
    return (log_partition_C - target_logits_C).where(valid_C, 0.0), log_partition_C, valid_C


def _triton(
    logits_CV: Tensor, targets_C: Tensor, factor: float, z_loss: float, copy_CV: Tensor | None, copy_factor: float
) -> tuple[Tensor, Tensor]:
    from megamtp.losses import kernels

    nll_C, squared_log_partition_C = torch.empty(2, len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    num_columns = logits_CV.shape[1]
    kernels.softmax_gradient[(len(logits_CV),)](
        logits_CV,
        targets_C,
        nll_C,
        squared_log_partition_C,
        copy_CV,
        num_columns,
        logits_CV.stride(0),
        factor,
        z_loss,
        copy_factor,
        ignored=IGNORED,
        block=BLOCK_COLUMNS,
        num_warps=16,
    )
    return nll_C, squared_log_partition_C
