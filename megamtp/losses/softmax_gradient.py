"""Logits -> the gradient of cross-entropy with respect to them, in place, and each row's loss.

On a GPU one kernel reads each row from memory once and writes it once; elsewhere the same in torch's operations.
Shapes: C rows, V vocabulary.
"""

import functools
from typing import Any, no_type_check

import torch
from torch import Tensor

from megamtp.targets import IGNORED

BLOCK = 16384  # columns that a kernel program holds at a time


def softmax_gradient_(
    logits_CV: Tensor, targets_C: Tensor, factor: float, z_loss: float, copy_CV: Tensor | None = None, copy_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Overwrites `logits_CV` with factor * d(nll + z_loss * log_partition^2)/d logits; zero in rows whose target is IGNORED.

    Args:
        copy_CV: receives the same with copy_scale in the place of factor, in its own dtype.

    Returns:
        (nll, squared log-partition): [C] in fp32 (fp64 for fp64), both 0 where the target is IGNORED.
    """
    if logits_CV.is_cuda and logits_CV.dtype != torch.float64:
        return _triton(logits_CV, targets_C, factor, z_loss, copy_CV, copy_scale)
    nll_C, log_partition_C, valid_C = negative_log_likelihood_(logits_CV, targets_C)
    ones_C = valid_C.to(logits_CV.dtype)
    logits_CV.mul_((ones_C * (1 + 2 * z_loss * log_partition_C))[:, None])
    logits_CV.scatter_add_(1, targets_C.where(valid_C, 0)[:, None], -ones_C[:, None])
    if copy_CV is not None:
        copy_CV.copy_(logits_CV * copy_scale)
    logits_CV.mul_(factor)
    return nll_C, log_partition_C.square() * valid_C


def negative_log_likelihood_(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, log-partition, validity) of each row; overwrites the logits with softmax probabilities."""
    valid_C = targets_C != IGNORED
    target_logits_C = logits_CV.gather(1, targets_C.where(valid_C, 0)[:, None])[:, 0]
    largest_C = logits_CV.amax(dim=1)
    partition_C = logits_CV.sub_(largest_C[:, None]).exp_().sum(dim=1)
    log_partition_C = partition_C.log() + largest_C
    logits_CV.div_(partition_C[:, None])
    return (log_partition_C - target_logits_C).where(valid_C, 0.0), log_partition_C, valid_C


def _triton(
    logits_CV: Tensor, targets_C: Tensor, factor: float, z_loss: float, copy_CV: Tensor | None, copy_scale: float
) -> tuple[Tensor, Tensor]:
    nll_C, squared_C = torch.empty(2, len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    num_columns = logits_CV.shape[1]
    _kernel()[(len(logits_CV),)](
        logits_CV, targets_C, nll_C, squared_C, copy_CV, num_columns, logits_CV.stride(0), factor, z_loss, copy_scale,
        ignored=IGNORED, block=BLOCK, num_warps=16,
    )  # fmt: skip
    return nll_C, squared_C


@functools.cache
def row_statistics() -> Any:
    """Triton's function (logits of a row, number of columns, block) -> (largest logit, sum of exp(logit - largest)), for kernels of
    one program a row. Online: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3."""
    import triton
    import triton.language as tl

    @triton.jit
    @no_type_check
    def statistics(logits, num_columns, block: tl.constexpr):
        columns = tl.arange(0, block)
        largest, partition = -float("inf"), 0.0
        for start in range(0, num_columns, block):
            values = tl.load(logits + start + columns, mask=start + columns < num_columns, other=-float("inf")).to(tl.float32)
            new_largest = tl.maximum(largest, tl.max(values))
            partition = partition * tl.exp(largest - new_largest) + tl.sum(tl.exp(values - new_largest))
            largest = new_largest
        return largest, partition

    return statistics


@functools.cache
def _kernel() -> Any:
    """One program a row: its statistics first; then a loop, whose reads come from the cache, writes the gradient and its copy as if
    no column were the target; then the target's.
    """
    import triton
    import triton.language as tl

    statistics = row_statistics()

    @triton.jit
    @no_type_check
    def kernel(
        logits, targets, nll, squared, copy, num_columns, stride, factor, z_loss, copy_scale,
        ignored: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        first_copy = row * num_columns
        target = tl.load(targets + row)
        columns = tl.arange(0, block)
        largest, partition = statistics(logits, num_columns, block)
        log_partition = largest + tl.log(partition)
        valid = target != ignored
        exists = (target >= 0) & (target < num_columns)  # nothing is written elsewhere, whatever the target
        target_logit = tl.load(logits + target, mask=exists, other=0.0).to(tl.float32)
        tl.store(nll + row, tl.where(valid, log_partition - target_logit, 0.0))
        tl.store(squared + row, tl.where(valid, log_partition * log_partition, 0.0))
        one = tl.where(valid, 1.0, 0.0)
        scale = one * (1 + 2 * z_loss * log_partition) / partition
        tl.debug_barrier()  # all have read the target's logit before anyone overwrites it
        for start in range(0, num_columns, block):
            inside = start + columns < num_columns
            values = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
            weights = tl.exp(values - largest)
            tl.store(logits + start + columns, (factor * scale * weights).to(logits.dtype.element_ty), mask=inside)
            if copy is not None:
                narrow = (copy_scale * scale * weights).to(copy.dtype.element_ty)
                tl.store(copy + first_copy + start + columns, narrow, mask=inside)
        tl.debug_barrier()  # the loop has written the target's column, too
        gradient = scale * tl.exp(target_logit - largest) - one
        tl.store(logits + target, (factor * gradient).to(logits.dtype.element_ty), mask=exists)
        if copy is not None:
            tl.store(copy + first_copy + target, (copy_scale * gradient).to(copy.dtype.element_ty), mask=exists)

    return kernel
