"""The Triton kernels of the losses. Only code that runs on a GPU imports this module: Triton is not installed without.

Kernels of one program a row visit the row's columns in blocks; `block` columns are in registers at a time.

Tests: tests/gpu/test_linear_cross_entropy.py, tests/gpu/test_vocabulary_slice.py, tests/gpu/test_float8.py.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def row_statistics(logits, num_columns, block: tl.constexpr):
    """(largest logit, sum of exp(logit - largest)) of one row, in one pass.

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
    squared,
    copy,
    num_columns,
    stride,
    factor,
    z_loss,
    copy_scale,
    ignored: tl.constexpr,
    block: tl.constexpr,
):
    """One program a row. First the row's statistics; then a loop, whose reads hit the cache, writes the gradient and
    its copy as if no column were the target; last the target's column.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    first_copy = row * num_columns
    target = tl.load(targets + row)
    columns = tl.arange(0, block)
    largest, partition = row_statistics(logits, num_columns, block)
    log_partition = largest + tl.log(partition)
    valid = target != ignored
    exists = (target >= 0) & (target < num_columns)  # a wrong target must not write to other memory
    target_logit = tl.load(logits + target, mask=exists, other=0.0).to(tl.float32)
    tl.store(nll + row, tl.where(valid, log_partition - target_logit, 0.0))
    tl.store(squared + row, tl.where(valid, log_partition * log_partition, 0.0))
    one = tl.where(valid, 1.0, 0.0)
    scale = one * (1 + 2 * z_loss * log_partition) / partition
    tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
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


@triton.jit
@no_type_check
def slice_statistics(logits, targets, found, num_rows, num_columns, stride, block: tl.constexpr):
    """One program a row of a slice's logits: `found` [3, num_rows] receives the statistics and the target's logit."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    largest, partition = row_statistics(logits, num_columns, block)
    target_logit = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    tl.store(found + row, largest)
    tl.store(found + num_rows + row, partition)
    tl.store(found + 2 * num_rows + row, tl.where(target >= 0, target_logit, 0.0))


@triton.jit
@no_type_check
def slice_gradient(logits, targets, log_partitions, scales, num_columns, stride, factor, block: tl.constexpr):
    """One program a row: overwrites a slice's logits with their gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    log_partition, scale = tl.load(log_partitions + row), tl.load(scales + row)
    columns = tl.arange(0, block)
    for start in range(0, num_columns, block):
        inside = start + columns < num_columns
        values = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        found = scale * tl.exp(values - log_partition) - tl.where(start + columns == target, factor, 0.0)
        tl.store(logits + start + columns, found.to(logits.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def quantise(
    x,
    amax,
    quantised,
    transposed,
    scale,
    num_rows,
    num_columns,
    largest: tl.constexpr,
    smallest_amax: tl.constexpr,
    block: tl.constexpr,
):
    """One program a tile of block x block elements: reads it once and writes it once or, transposed, twice."""
    rows = (tl.program_id(0).to(tl.int64) * block + tl.arange(0, block))[:, None]
    columns = (tl.program_id(1).to(tl.int64) * block + tl.arange(0, block))[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    unit = tl.maximum(tl.load(amax).to(tl.float32), smallest_amax)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, unit / largest)
    values = tl.load(x + rows * num_columns + columns, mask=inside).to(tl.float32) * (largest / unit)
    narrow = values.to(quantised.dtype.element_ty)
    tl.store(quantised + rows * num_columns + columns, narrow, mask=inside)
    if transposed is not None:
        tl.store(transposed + columns * num_rows + rows, narrow, mask=inside)
