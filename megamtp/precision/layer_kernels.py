"""The Triton kernels of RMSNorm and SwiGLU that read or write fp8. See kernels.py.

Tests: tests/gpu/test_operations.py.
"""

from typing import no_type_check

import triton
import triton.language as tl

from megamtp.precision.kernels import factor_of, pack, read_amax, scale_of, store_transposed


@triton.jit
@no_type_check
def norm_quantise(
    x,
    added,
    total,
    weight,
    quantised,
    reciprocal_rms,
    num_columns,
    scale_index,
    eps: tl.constexpr,
    bound: tl.constexpr,
    largest: tl.constexpr,
    min_amax: tl.constexpr,
    block: tl.constexpr,
):
    """Writes a row's norm in e4m3, 1 / rms of each row, and at scale_index the scale bound * max |weight| / largest.

    One program per row; `block` is at least the number of columns. If `added` is given, the kernel writes x + added to
    `total`, and normalises the sum.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < num_columns
    values = tl.load(x + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        values += tl.load(added + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(x.dtype.element_ty)
        tl.store(total + row * num_columns + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    reciprocal = tl.rsqrt(tl.sum(values * values) / num_columns + eps)
    amax = tl.maximum(bound * tl.max(tl.abs(weights)), min_amax)
    normed = (values * reciprocal * weights).to(x.dtype.element_ty).to(tl.float32)
    normed8 = (normed * factor_of(amax, largest)).to(quantised.dtype.element_ty)
    tl.store(quantised + row * num_columns + columns, normed8, mask=inside)
    tl.store(reciprocal_rms + row, reciprocal)
    if row == 0:
        tl.store(reciprocal_rms + scale_index, scale_of(amax, largest))


@triton.jit
@no_type_check
def norm_backward(
    d_normed, x, weight, reciprocal_rms, residual, d_x, d_weight_parts, num_rows, num_columns, block: tl.constexpr
):
    """Writes residual + d_normed's gradient with respect to x, and each program's sum of the weight's gradient.

    Each program loops over rows; `block` is at least the number of columns.
    """
    columns = tl.arange(0, block)
    inside = columns < num_columns
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    d_weights = tl.zeros([block], dtype=tl.float32)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64) * num_columns
        gradient = tl.load(d_normed + row + columns, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
        added = tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        reciprocal = tl.load(reciprocal_rms + index)
        unit = values * reciprocal
        d_weights += gradient * unit
        gradient *= weights
        mean = tl.sum(gradient * unit) / num_columns
        d_values = added + reciprocal * (gradient - unit * mean)
        tl.store(d_x + row + columns, d_values.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_weight_parts + tl.program_id(0) * num_columns + columns, d_weights, mask=inside)


@triton.jit
@no_type_check
def _load(matrix, row, column, inside, stride):
    return tl.load(matrix + row * stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _swiglu_gradients(gradient, gate, up):
    """Returns the gradients with respect to (gate, up)."""
    sigmoid = tl.sigmoid(gate)
    return gradient * up * sigmoid * (1 + gate * (1 - sigmoid)), gradient * gate * sigmoid


@triton.jit
@no_type_check
def swiglu_maxima(gate, up, maxima, num_rows, num_columns, stride, block: tl.constexpr):
    """Writes the largest magnitude of silu(gate) * up in this program's rows."""
    largest = tl.zeros([block], dtype=tl.float32)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        for start in range(0, num_columns, block):
            column = start + tl.arange(0, block)
            inside = column < num_columns
            gates, ups = _load(gate, row, column, inside, stride), _load(up, row, column, inside, stride)
            largest = tl.maximum(largest, tl.abs(gates * tl.sigmoid(gates) * ups))
    tl.store(maxima + tl.program_id(0), tl.max(largest))


@triton.jit
@no_type_check
def swiglu_quantise(
    gate,
    up,
    maxima,
    quantised,
    transposed,
    num_rows,
    num_columns,
    stride,
    largest: tl.constexpr,
    min_amax: tl.constexpr,
    num_maxima: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Writes silu(gate) * up, divided by the scale; its transpose; and the scale."""
    first_row, first_column = tl.program_id(0) * rows, tl.program_id(1) * columns
    column = first_column + tl.arange(0, columns)[None, :]
    amax = read_amax(maxima, num_maxima, min_amax)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(maxima + num_maxima, scale_of(amax, largest))
    factor = factor_of(amax, largest)
    words = tl.zeros([rows // 4, columns], dtype=tl.uint32)
    for index in tl.static_range(4):
        row = tl.cast(first_row, tl.int64) + 4 * tl.arange(0, rows // 4)[:, None] + index
        inside = (row < num_rows) & (column < num_columns)
        gates, ups = _load(gate, row, column, inside, stride), _load(up, row, column, inside, stride)
        scaled = gates * tl.sigmoid(gates) * ups * factor
        tl.store(quantised + row * num_columns + column, scaled.to(quantised.dtype.element_ty), mask=inside)
        words = pack(words, scaled, index, quantised.dtype.element_ty)
    store_transposed(transposed, words, first_row, first_column, num_rows, num_columns, num_rows, rows, columns)


@triton.jit
@no_type_check
def swiglu_backward_maxima(d_hidden, gate, up, maxima, num_rows, num_columns, stride, block: tl.constexpr):
    """Writes the largest magnitude of the gradients with respect to gate and up in this program's rows."""
    largest = tl.zeros([block], dtype=tl.float32)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        for start in range(0, num_columns, block):
            column = start + tl.arange(0, block)
            inside = column < num_columns
            gates, ups = _load(gate, row, column, inside, stride), _load(up, row, column, inside, stride)
            gradient = _load(d_hidden, row, column, inside, num_columns)
            d_gates, d_ups = _swiglu_gradients(gradient, gates, ups)
            largest = tl.maximum(largest, tl.maximum(tl.abs(d_gates), tl.abs(d_ups)))
    tl.store(maxima + tl.program_id(0), tl.max(largest))


@triton.jit
@no_type_check
def swiglu_backward(
    d_hidden,
    gate,
    up,
    maxima,
    quantised,
    transposed,
    num_rows,
    num_columns,
    stride,
    largest: tl.constexpr,
    min_amax: tl.constexpr,
    num_maxima: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Writes the gradients with respect to gate and up side by side, in fp8; their transpose; and the scale."""
    first_row, first_column = tl.program_id(0) * rows, tl.program_id(1) * columns
    column = first_column + tl.arange(0, columns)[None, :]
    amax = read_amax(maxima, num_maxima, min_amax)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(maxima + num_maxima, scale_of(amax, largest))
    factor = factor_of(amax, largest)
    gate_words = tl.zeros([rows // 4, columns], dtype=tl.uint32)
    up_words = tl.zeros([rows // 4, columns], dtype=tl.uint32)
    for index in tl.static_range(4):
        row = tl.cast(first_row, tl.int64) + 4 * tl.arange(0, rows // 4)[:, None] + index
        inside = (row < num_rows) & (column < num_columns)
        gates, ups = _load(gate, row, column, inside, stride), _load(up, row, column, inside, stride)
        d_gates, d_ups = _swiglu_gradients(_load(d_hidden, row, column, inside, num_columns), gates, ups)
        d_gates, d_ups = d_gates * factor, d_ups * factor
        target = quantised + row * (2 * num_columns) + column
        tl.store(target, d_gates.to(quantised.dtype.element_ty), mask=inside)
        tl.store(target + num_columns, d_ups.to(quantised.dtype.element_ty), mask=inside)
        gate_words = pack(gate_words, d_gates, index, quantised.dtype.element_ty)
        up_words = pack(up_words, d_ups, index, quantised.dtype.element_ty)
    store_transposed(transposed, gate_words, first_row, first_column, num_rows, num_columns, num_rows, rows, columns)
    target = transposed + tl.cast(num_columns, tl.int64) * (num_rows // 4)
    store_transposed(target, up_words, first_row, first_column, num_rows, num_columns, num_rows, rows, columns)
