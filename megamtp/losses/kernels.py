"""The Triton kernels of the losses.

Import this module only in code that runs on a GPU: without one, Triton is not installed.

Kernels with one program per row loop over the row's columns and hold `block` columns in registers at a time.

Tests: tests/gpu/test_linear_cross_entropy.py, tests/gpu/test_vocabulary_slice.py, tests/gpu/test_float8.py.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def row_statistics(logits, num_columns, block: tl.constexpr):
    """Returns (largest logit, sum of exp(logit - largest)) of one row, in one pass.

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    columns = tl.arange(0, block)
    largest, partition = -float("inf"), 0.0
    for start in range(0, num_columns, block):
        inside = start + columns < num_columns
        values = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(values))
        partition = partition * tl.exp(largest - new_largest) + tl.sum(tl.exp(values - new_largest))
        largest = new_largest
    return largest, partition


@triton.jit
@no_type_check
def softmax_gradient(
    logits,
    targets,
    nll,
    squared_log_partition,
    copy,
    num_columns,
    stride,
    factor,
    z_loss,
    copy_factor,
    ignored: tl.constexpr,
    block: tl.constexpr,
):
    """Overwrites the logits with their gradient; one program per row.

    The first loop computes the row's statistics. The second, whose reads hit the cache, writes the gradient and its
    copy as if no column were the target; the target's column is corrected at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    first_copy = row * num_columns
    target = tl.load(targets + row)
    columns = tl.arange(0, block)
    largest, partition = row_statistics(logits, num_columns, block)
    log_partition = largest + tl.log(partition)
    valid = target != ignored
    in_row = (target >= 0) & (target < num_columns)  # an invalid target must not write to other memory
    target_logit = tl.load(logits + target, mask=in_row, other=0.0).to(tl.float32)
    tl.store(nll + row, tl.where(valid, log_partition - target_logit, 0.0))
    tl.store(squared_log_partition + row, tl.where(valid, log_partition * log_partition, 0.0))
    valid_factor = tl.where(valid, 1.0, 0.0)
    scale = valid_factor * (1 + 2 * z_loss * log_partition) / partition
    tl.debug_barrier()  # all threads must read the target's logit before any thread overwrites it
    for start in range(0, num_columns, block):
        inside = start + columns < num_columns
        values = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        weights = tl.exp(values - largest)
        tl.store(logits + start + columns, (factor * scale * weights).to(logits.dtype.element_ty), mask=inside)
        if copy is not None:
            copied = (copy_factor * scale * weights).to(copy.dtype.element_ty)
            tl.store(copy + first_copy + start + columns, copied, mask=inside)
    tl.debug_barrier()  # the loop must have written the target's column before it is corrected
    gradient = scale * tl.exp(target_logit - largest) - valid_factor
    tl.store(logits + target, (factor * gradient).to(logits.dtype.element_ty), mask=in_row)
    if copy is not None:
        tl.store(copy + first_copy + target, (copy_factor * gradient).to(copy.dtype.element_ty), mask=in_row)


@triton.jit
@no_type_check
def slice_statistics(logits, targets, statistics, num_rows, num_columns, stride, block: tl.constexpr):
    """Writes (largest logit, partition, target's logit) of a slice to `statistics` [3, rows]; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    largest, partition = row_statistics(logits, num_columns, block)
    target_logit = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    tl.store(statistics + row, largest)
    tl.store(statistics + num_rows + row, partition)
    tl.store(statistics + 2 * num_rows + row, tl.where(target >= 0, target_logit, 0.0))


@triton.jit
@no_type_check
def slice_gradient(logits, targets, log_partitions, scales, num_columns, stride, factor, block: tl.constexpr):
    """Overwrites a slice's logits with their gradient; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    log_partition, scale = tl.load(log_partitions + row), tl.load(scales + row)
    columns = tl.arange(0, block)
    for start in range(0, num_columns, block):
        inside = start + columns < num_columns
        values = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = scale * tl.exp(values - log_partition) - tl.where(start + columns == target, factor, 0.0)
        tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)
