"""The Triton kernels that quantise and transpose; layer_kernels.py fuses this with norms and SwiGLU.

Import this module only in code that runs on a GPU: without one, Triton is not installed. operations.py launches the
kernels and holds the same formulas in torch.

Fp8 products need both factors contiguous along the summed dimension. Kernels therefore write a matrix and its transpose
in one pass where both are needed. Kernels on tiles have one program per tile of `rows` x `columns` elements.

A scale needs the largest magnitude before the first element is quantised. A first kernel therefore writes the largest
magnitude that each of its programs finds to `maxima`; each program of the second kernel reads all of them, and one
writes the scale behind them.

torch.compile must know which arguments a kernel writes. It assumes that a stored address depends on all arguments of
the functions that compute it, so such functions get no pointers.

Tests: tests/gpu/test_operations.py.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _store_transposed(
    target, tile, first_row, first_column, num_rows, num_columns, height, rows: tl.constexpr, columns: tl.constexpr
):
    """Stores the transpose of a tile of a [num_rows, num_columns] matrix in `target`, with `height` elements in a row.

    Check the result on a GPU: Triton 3.6 loses every fourth row if the tile is computed from two loads.
    """
    row = first_row + tl.arange(0, rows)[None, :]
    column = first_column + tl.arange(0, columns)[:, None]
    inside = (row < num_rows) & (column < num_columns)
    tl.store(target + column.to(tl.int64) * height + row, tl.trans(tile), mask=inside)


@triton.jit
@no_type_check
def _piece(tile, size1, size2, size3, block: tl.constexpr):
    """Returns (index, size, elements before it, first element in it) of the piece that holds a tile.

    Tiles of `block` elements cover three pieces that lie one behind the other. The last two may be empty.
    """
    tiles1, tiles2 = tl.cdiv(size1, block), tl.cdiv(size2, block)
    in_second, in_third = (tile >= tiles1) & (tile < tiles1 + tiles2), tile >= tiles1 + tiles2
    size = tl.where(in_third, size3, tl.where(in_second, size2, size1))
    offset = tl.where(in_third, size1 + size2, tl.where(in_second, size1, 0))
    tile -= tl.where(in_third, tiles1 + tiles2, tl.where(in_second, tiles1, 0))
    return tl.where(in_third, 2, tl.where(in_second, 1, 0)), size, offset, tile * block


@triton.jit
@no_type_check
def _load_piece(first, second, third, index, stride1, stride2, stride3, row, column, inside):
    """Returns a tile of the piece with the index."""
    if index == 0:
        values = tl.load(first + row * stride1 + column, mask=inside)
    elif index == 1:
        values = tl.load(second + row * stride2 + column, mask=inside)
    else:
        values = tl.load(third + row * stride3 + column, mask=inside)
    return values


@triton.jit
@no_type_check
def _row_maxima(matrix, row, num_columns, stride, block: tl.constexpr):
    """Returns the largest magnitude of each column of a row's blocks; NaN does not count."""
    largest = tl.zeros([block], dtype=tl.float32)
    for start in range(0, num_columns, block):
        column = start + tl.arange(0, block)
        values = tl.load(matrix + row * stride + column, mask=column < num_columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    return largest


@triton.jit
@no_type_check
def largest_magnitude(
    first, second, third, maxima, num_rows, columns1, columns2, columns3, stride1, stride2, stride3, block: tl.constexpr
):
    """Writes the largest magnitude in this program's rows of up to three matrices."""
    largest = tl.zeros([block], dtype=tl.float32)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        largest = tl.maximum(largest, _row_maxima(first, row, columns1, stride1, block))
        largest = tl.maximum(largest, _row_maxima(second, row, columns2, stride2, block))
        largest = tl.maximum(largest, _row_maxima(third, row, columns3, stride3, block))
    tl.store(maxima + tl.program_id(0), tl.max(largest))


@triton.jit
@no_type_check
def read_amax(maxima, num_maxima: tl.constexpr, min_amax: tl.constexpr):
    """Returns the largest magnitude of all programs, at least min_amax."""
    return tl.maximum(tl.max(tl.load(maxima + tl.arange(0, num_maxima))), min_amax)


@triton.jit
@no_type_check
def to_float8(values, amax, largest: tl.constexpr, dtype: tl.constexpr):
    """Returns values * (largest / amax), rounded to fp8. Divides as torch does; Triton's `/` rounds differently."""
    return (values * tl.div_rn(tl.full((), largest, tl.float32), amax)).to(dtype)


@triton.jit
@no_type_check
def scale_of(amax, largest: tl.constexpr):
    return tl.div_rn(amax, tl.full((), largest, tl.float32))


@triton.jit
@no_type_check
def quantise(
    first,
    second,
    third,
    maxima,
    quantised,
    transposed,
    num_rows,
    columns1,
    columns2,
    columns3,
    stride1,
    stride2,
    stride3,
    largest: tl.constexpr,
    min_amax: tl.constexpr,
    num_maxima: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Writes up to three matrices side by side, divided by the scale; the scale; and, if given, the transpose."""
    piece, num_columns, offset, start = _piece(tl.program_id(1), columns1, columns2, columns3, columns)
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    column = start + tl.arange(0, columns)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    amax = read_amax(maxima, num_maxima, min_amax)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(maxima + num_maxima, scale_of(amax, largest))
    values = _load_piece(first, second, third, piece, stride1, stride2, stride3, row, column, inside)
    values8 = to_float8(values.to(tl.float32), amax, largest, quantised.dtype.element_ty)
    tl.store(quantised + row * (columns1 + columns2 + columns3) + offset + column, values8, mask=inside)
    if transposed is not None:
        target = transposed + tl.cast(offset, tl.int64) * num_rows
        first_row = tl.program_id(0) * rows
        _store_transposed(target, values8, first_row, start, num_rows, num_columns, num_rows, rows, columns)


@triton.jit
@no_type_check
def transpose(
    first, second, third, after, transposed, num_columns, rows1, rows2, rows3, rows: tl.constexpr, columns: tl.constexpr
):
    """Writes the transpose of up to three contiguous matrices of one width, one below the other.

    `after` is not read. See operations.transpose.
    """
    piece, num_rows, offset, start = _piece(tl.program_id(1), rows1, rows2, rows3, rows)
    row = start + tl.arange(0, rows)[:, None]
    first_column = tl.program_id(0) * columns
    column = first_column + tl.arange(0, columns)[None, :]
    inside = (row < num_rows) & (column < num_columns)
    row = row.to(tl.int64)
    values = _load_piece(first, second, third, piece, num_columns, num_columns, num_columns, row, column, inside)
    height = rows1 + rows2 + rows3
    _store_transposed(transposed + offset, values, start, first_column, num_rows, num_columns, height, rows, columns)


@triton.jit
@no_type_check
def quantise_tensors(
    table, factors, num_tensors, source_type: tl.constexpr, target_type: tl.constexpr, block: tl.constexpr
):
    """Writes each tensor times its factor in fp8. Programs along axis 1 share the elements of one tensor.

    Args:
        table: int64 [4, tensors]: addresses of the sources and of the targets, number of elements, index of the factor.
    """
    tensor = tl.program_id(0)
    source = tl.load(table + tensor).to(tl.pointer_type(source_type))
    target = tl.load(table + num_tensors + tensor).to(tl.pointer_type(target_type))
    num_elements = tl.load(table + 2 * num_tensors + tensor)
    factor = tl.load(factors + tl.load(table + 3 * num_tensors + tensor))
    for start in range(tl.program_id(1) * block, num_elements, tl.num_programs(1) * block):
        element = start + tl.arange(0, block)
        inside = element < num_elements
        values = tl.load(source + element, mask=inside).to(tl.float32) * factor
        tl.store(target + element, values.to(target_type), mask=inside)
