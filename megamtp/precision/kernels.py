"""The Triton kernels that quantise and transpose; layer_kernels.py fuses this with norms and SwiGLU.

Import this module only in code that runs on a GPU: without one, Triton is not installed. operations.py launches the
kernels and holds the same formulas in torch.

Fp8 products need both factors contiguous along the summed dimension. Kernels therefore write a matrix and its transpose
in one pass where both are needed. Kernels on tiles have one program per tile of `rows` x `columns` elements. To
transpose a tile, they pack four numbers of a column, one from each of four rows, into a 32-bit word, because a GPU
moves words faster than bytes. The number of rows must therefore be a multiple of 4.

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


def _packing(instruction: str) -> tl.constexpr:
    """Returns assembly: $0 = $1 | fp8($2) << $3."""
    return tl.constexpr(
        "{ .reg .f32 zero; .reg .b16 pair; .reg .b32 byte; mov.f32 zero, 0f00000000; "
        f"{instruction} pair, zero, $2; cvt.u32.u16 byte, pair; shl.b32 byte, byte, $3; or.b32 $0, $1, byte; }}"
    )


PACK_E4M3, PACK_E5M2 = _packing("cvt.rn.satfinite.e4m3x2.f32"), _packing("cvt.rn.satfinite.e5m2x2.f32")


@triton.jit
@no_type_check
def pack(words, values, index: tl.constexpr, dtype: tl.constexpr):
    """Returns `words`, 32 bits each, with the values as byte `index`, rounded to `dtype`.

    Triton 3.6 loses values if it packs the results of its own conversion to fp8, so this is assembly.
    """
    operands = [words, values, 8 * index]
    if dtype == tl.float8e4nv:
        packed = tl.inline_asm_elementwise(PACK_E4M3, "=r,r,f,r", operands, dtype=tl.uint32, is_pure=True, pack=1)
    else:
        packed = tl.inline_asm_elementwise(PACK_E5M2, "=r,r,f,r", operands, dtype=tl.uint32, is_pure=True, pack=1)
    return packed


@triton.jit
@no_type_check
def store_transposed(
    target, words, first_row, first_column, num_rows, num_columns, height, rows: tl.constexpr, columns: tl.constexpr
):
    """Stores the transpose of a tile of a [num_rows, num_columns] matrix in fp8.

    Args:
        target: a matrix of 32-bit words that has `height` fp8 numbers, four to a word, in a row.
        words: [rows / 4, columns]; word (i, j) has the numbers of rows 4i to 4i + 3 in column j.
    """
    word = first_row // 4 + tl.arange(0, rows // 4)[None, :]
    column = first_column + tl.arange(0, columns)[:, None]
    inside = (4 * word < num_rows) & (column < num_columns)
    tl.store(target + column.to(tl.int64) * (height // 4) + word, tl.trans(words), mask=inside)


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
def factor_of(amax, largest: tl.constexpr):
    """Returns largest / amax. Divides as torch does; Triton's `/` rounds differently."""
    return tl.div_rn(tl.full((), largest, tl.float32), amax)


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
    first_row = tl.program_id(0) * rows
    column = start + tl.arange(0, columns)[None, :]
    amax = read_amax(maxima, num_maxima, min_amax)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(maxima + num_maxima, scale_of(amax, largest))
    factor = factor_of(amax, largest)
    words = tl.zeros([rows // 4, columns], dtype=tl.uint32)
    for index in tl.static_range(4):
        row = tl.cast(first_row, tl.int64) + 4 * tl.arange(0, rows // 4)[:, None] + index
        inside = (row < num_rows) & (column < num_columns)
        values = _load_piece(first, second, third, piece, stride1, stride2, stride3, row, column, inside)
        scaled = values.to(tl.float32) * factor
        target = quantised + row * (columns1 + columns2 + columns3) + offset + column
        tl.store(target, scaled.to(quantised.dtype.element_ty), mask=inside)
        words = pack(words, scaled, index, quantised.dtype.element_ty)
    if transposed is not None:
        target = transposed + tl.cast(offset, tl.int64) * (num_rows // 4)
        store_transposed(target, words, first_row, start, num_rows, num_columns, num_rows, rows, columns)


@triton.jit
@no_type_check
def transpose(
    first, second, third, after, transposed, num_columns, rows1, rows2, rows3, rows: tl.constexpr, columns: tl.constexpr
):
    """Writes the transpose of up to three contiguous matrices of one width, one below the other.

    `after` is not read. See operations.transpose.
    """
    piece, num_rows, offset, start = _piece(tl.program_id(1), rows1, rows2, rows3, rows)
    first_column = tl.program_id(0) * columns
    column = first_column + tl.arange(0, columns)[None, :]
    words = tl.zeros([rows // 4, columns], dtype=tl.uint32)
    for index in tl.static_range(4):
        row = tl.cast(start, tl.int64) + 4 * tl.arange(0, rows // 4)[:, None] + index
        inside = (row < num_rows) & (column < num_columns)
        values8 = _load_piece(first, second, third, piece, num_columns, num_columns, num_columns, row, column, inside)
        words |= values8.to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * index)
    height = rows1 + rows2 + rows3
    store_transposed(transposed + offset // 4, words, start, first_column, num_rows, num_columns, height, rows, columns)


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
