"""Quantisation to fp8, alone or fused with an RMSNorm or SwiGLU, and products of quantised matrices.

A quantised matrix is a pair (x / scale in fp8, scale) with one fp32 scale [1, 1], which maps the largest magnitude, or
a bound of it, to the largest fp8 number. Weights and activations are in e4m3; gradients are in e5m2, which has fewer
mantissa bits but spans 30 powers of two.

On a GPU, Triton kernels run (kernels.py); elsewhere the same formulas in torch, slowly. Rounding may differ in the last
bit of the scaled value.

One scale per tensor is enough, because fp8 numbers are floating-point numbers: for normal operands it leaves an error
of 3.7 % in an output, where a scale for every 128 numbers leaves 3.6 %; in the gradients, 5.9 % and 5.7 %. A finer
scale helps only if some columns are much larger than the others (`python tools/benchmark.py float8`). It would need
another quantised copy for each product, because the three products of a weight sum over different dimensions.

Source: Micikevicius et al. 2022, arXiv:2209.05433, for the formats and their use.
Shapes: [M, N] is any matrix.

Tests: tests/unit/precision/test_operations.py, tests/gpu/test_operations.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
MIN_AMAX = 2.0**-100  # so that the scale of a tensor of zeros is not 0
TILE = {"rows": 128, "columns": 64, "num_warps": 4}
MAXIMA = {"num_maxima": 1024}  # programs that look for the largest magnitude
MAXIMA_BLOCK = {"block": 1024, "num_warps": 4}
NORM_PROGRAMS = 264  # 2 per multiprocessor of an H100 or H200


def quantise(x_MN: Tensor, dtype: torch.dtype = E4M3, transposed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns (x / scale, scale).

    Args:
        transposed: [N, M] in `dtype`; receives the transpose of the result. M must be a multiple of 4.
    """
    return _quantise([x_MN], dtype, None if transposed is None else transposed.view(torch.int32))


def quantise_with_transpose(pieces: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises up to three matrices [M, N_i] side by side, with one scale. M must be a multiple of 4.

    Returns:
        (x / scale [M, N], its transpose [N, M], scale), where N is the sum of the N_i.
    """
    width = sum(piece.shape[1] for piece in pieces)
    words = _empty_words(width, len(pieces[0]), pieces[0].device)
    quantised_MN, scale = _quantise(pieces, dtype, words)
    return quantised_MN, words.view(dtype), scale


def _empty_words(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Returns memory for a matrix in fp8 as 32-bit words of four numbers, which is how kernels write transposes."""
    assert num_columns % 4 == 0, f"{num_columns} rows to transpose; expected a multiple of 4"
    return torch.empty(num_rows, num_columns // 4, dtype=torch.int32, device=device)


def _quantise(pieces: Sequence[Tensor], dtype: torch.dtype, words: Tensor | None) -> tuple[Tensor, Tensor]:
    if not pieces[0].is_cuda:
        x_MN = torch.cat([piece.float() for piece in pieces], 1) if len(pieces) > 1 else pieces[0].float()
        amax = torch.linalg.vector_norm(x_MN, float("inf"))
        quantised_MN, scale = _scaled(x_MN, amax, dtype)
        if words is not None:
            words.view(dtype).copy_(quantised_MN.T)
        return quantised_MN, scale
    from megamtp.precision import kernels

    num_rows, device = len(pieces[0]), pieces[0].device
    pieces = [piece if piece.stride(1) == 1 else piece.contiguous() for piece in pieces]
    padded = [*pieces, *[pieces[0]] * (3 - len(pieces))]
    widths = [piece.shape[1] if index < len(pieces) else 0 for index, piece in enumerate(padded)]
    sizes = num_rows, *widths, *(piece.stride(0) for piece in padded)
    maxima = _empty_maxima(device)
    quantised_MN = torch.empty(num_rows, sum(widths), dtype=dtype, device=device)
    kernels.largest_magnitude[(MAXIMA["num_maxima"],)](*padded, maxima, *sizes, **MAXIMA_BLOCK)
    grid = _cdiv(num_rows, TILE["rows"]), sum(_cdiv(width, TILE["columns"]) for width in widths)
    kernels.quantise[grid](
        *padded, maxima, quantised_MN, words, *sizes, largest=LARGEST[dtype], min_amax=MIN_AMAX, **MAXIMA, **TILE
    )
    return quantised_MN, _scale_behind(maxima, MAXIMA["num_maxima"])


def _empty_maxima(device: torch.device) -> Tensor:
    """Returns memory for the largest magnitudes that programs find, and for the scale behind them."""
    return torch.empty(MAXIMA["num_maxima"] + 4, dtype=torch.float32, device=device)


def _scale_behind(values: Tensor, index: int) -> Tensor:
    """Returns the scale that a kernel has written at an index, as a view [1, 1]."""
    return values[index : index + 1].view(1, 1)


def _scaled(x: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (x / scale, scale) where the scale maps `amax` to the largest number of `dtype`."""
    amax = amax.float().clamp(min=MIN_AMAX)
    return (x.float() * (LARGEST[dtype] / amax)).to(dtype), (amax / LARGEST[dtype]).view(1, 1)


def transpose(matrices: Sequence[Tensor], after: Tensor) -> Tensor:
    """Returns the transpose [N, M] of up to three matrices [M_i, N], one below the other, in fp8.

    Each M_i must be a multiple of 4.

    Args:
        after: a tensor of the backward pass that is not read. torch.compile would otherwise move a transposition of
            what the forward pass knows into the forward pass, and keep its result in memory.
    """
    assert all(len(matrix) % 4 == 0 for matrix in matrices), "expected multiples of 4 rows to transpose"
    width, dtype = matrices[0].shape[1], matrices[0].dtype
    if not matrices[0].is_cuda:
        return torch.cat(list(matrices)).T.contiguous()
    from megamtp.precision import kernels

    padded = [*matrices, *[matrices[0]] * (3 - len(matrices))]
    heights = [len(matrix) if index < len(matrices) else 0 for index, matrix in enumerate(padded)]
    words = _empty_words(width, sum(heights), matrices[0].device)
    grid = (_cdiv(width, TILE["columns"]), sum(_cdiv(height, TILE["rows"]) for height in heights))
    kernels.transpose[grid](*padded, after, words, width, *heights, **TILE)
    return words.view(dtype)


def scaled_product(
    left_MK: Tensor, left_scale: Tensor, right_NK: Tensor, right_scale: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """Returns left @ right^T [M, N] of two quantised matrices, in `dtype`. K and N must be multiples of 16.

    Args:
        fast: use the tensor cores' fast accumulation, which keeps some 14 bits of a sum.
    """
    return torch._scaled_mm(
        left_MK, right_NK.T, scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast
    )


def norm_quantise(
    x_MN: Tensor, weight_N: Tensor, eps: float, added_MN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (h, y / scale in e4m3, scale, 1 / rms of each row [M] in fp32) with y = rms_norm(h) * weight.

    h is x, or x + added. The scale needs no pass over y: |y| is at most sqrt(N) * max |weight|.
    """
    x_MN = x_MN.contiguous()
    num_rows, num_columns = x_MN.shape
    bound = num_columns**0.5
    if not x_MN.is_cuda:
        x_MN = x_MN if added_MN is None else x_MN + added_MN
        normed_MN = F.rms_norm(x_MN, (num_columns,), weight_N, eps)
        reciprocal_rms_M = (x_MN.float().square().mean(1) + eps).rsqrt()
        quantised_MN, scale = _scaled(normed_MN, bound * weight_N.float().abs().max(), E4M3)
        return x_MN, quantised_MN, scale, reciprocal_rms_M
    from megamtp.precision import layer_kernels

    added_MN = None if added_MN is None else added_MN.contiguous()
    total_MN = x_MN if added_MN is None else torch.empty_like(x_MN)
    quantised_MN = torch.empty_like(x_MN, dtype=E4M3)
    scale_index = _cdiv(num_rows, 4) * 4  # cuBLAS needs scales at addresses that are multiples of 16 bytes
    reciprocal_rms_and_scale = torch.empty(scale_index + 4, dtype=torch.float32, device=x_MN.device)
    layer_kernels.norm_quantise[(num_rows,)](
        x_MN,
        added_MN,
        None if added_MN is None else total_MN,
        weight_N,
        quantised_MN,
        reciprocal_rms_and_scale,
        num_columns,
        scale_index,
        eps,
        bound,
        largest=LARGEST[E4M3],
        min_amax=MIN_AMAX,
        block=_next_power_of_two(num_columns),
        num_warps=8 if num_columns > 1024 else 4,
    )
    scale = _scale_behind(reciprocal_rms_and_scale, scale_index)
    return total_MN, quantised_MN, scale, reciprocal_rms_and_scale[:num_rows]


def norm_backward(
    d_normed_MN: Tensor, x_MN: Tensor, weight_N: Tensor, reciprocal_rms_M: Tensor, residual_MN: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns (residual + the gradient with respect to x, the gradient with respect to weight) of an RMSNorm."""
    x_MN, residual_MN = x_MN.contiguous(), residual_MN.contiguous()
    if not x_MN.is_cuda:
        unit_MN, gradient_MN = x_MN.float() * reciprocal_rms_M[:, None], d_normed_MN.float()
        d_weight_N = (gradient_MN * unit_MN).sum(0)
        gradient_MN = gradient_MN * weight_N.float()
        projection_MN = unit_MN * (gradient_MN * unit_MN).mean(1, keepdim=True)
        d_x_MN = residual_MN.float() + reciprocal_rms_M[:, None] * (gradient_MN - projection_MN)
        return d_x_MN.to(x_MN.dtype), d_weight_N.to(weight_N.dtype)
    from megamtp.precision import layer_kernels

    num_rows, num_columns = x_MN.shape
    num_programs = min(NORM_PROGRAMS, num_rows)
    d_x_MN = torch.empty_like(x_MN)
    parts = torch.empty(num_programs, num_columns, dtype=torch.float32, device=x_MN.device)
    layer_kernels.norm_backward[(num_programs,)](
        d_normed_MN,
        x_MN,
        weight_N,
        reciprocal_rms_M,
        residual_MN,
        d_x_MN,
        parts,
        num_rows,
        num_columns,
        block=_next_power_of_two(num_columns),
        num_warps=8 if num_columns > 1024 else 4,
    )
    return d_x_MN, parts.sum(0).to(weight_N.dtype)


def swiglu_quantise(gate_MN: Tensor, up_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (h / scale [M, N] in e4m3, its transpose [N, M], scale) with h = silu(gate) * up.

    Both arguments have the same strides. M must be a multiple of 4.
    """
    if not gate_MN.is_cuda:
        return quantise_with_transpose([F.silu(gate_MN.float()) * up_MN.float()], E4M3)
    from megamtp.precision import layer_kernels

    num_rows, num_columns = gate_MN.shape
    maxima = _empty_maxima(gate_MN.device)
    quantised_MN = torch.empty(num_rows, num_columns, dtype=E4M3, device=gate_MN.device)
    words = _empty_words(num_columns, num_rows, gate_MN.device)
    sizes = num_rows, num_columns, gate_MN.stride(0)
    constants = {"largest": LARGEST[E4M3], "min_amax": MIN_AMAX, **MAXIMA, **TILE}
    layer_kernels.swiglu_maxima[(MAXIMA["num_maxima"],)](gate_MN, up_MN, maxima, *sizes, **MAXIMA_BLOCK)
    grid = _cdiv(num_rows, TILE["rows"]), _cdiv(num_columns, TILE["columns"])
    layer_kernels.swiglu_quantise[grid](gate_MN, up_MN, maxima, quantised_MN, words, *sizes, **constants)
    return quantised_MN, words.view(E4M3), _scale_behind(maxima, MAXIMA["num_maxima"])


def swiglu_backward(d_hidden_MN: Tensor, gate_MN: Tensor, up_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of silu(gate) * up with respect to gate and up, side by side.

    M must be a multiple of 4.

    Returns:
        (gradients / scale [M, 2N] in e5m2, its transpose [2N, M], scale).
    """
    if not gate_MN.is_cuda:
        d_hidden_MN, gate_MN, up_MN = d_hidden_MN.float(), gate_MN.float(), up_MN.float()
        sigmoid_MN = gate_MN.sigmoid()
        d_gate_MN = d_hidden_MN * up_MN * sigmoid_MN * (1 + gate_MN * (1 - sigmoid_MN))
        return quantise_with_transpose([d_gate_MN, d_hidden_MN * gate_MN * sigmoid_MN], E5M2)
    from megamtp.precision import layer_kernels

    num_rows, num_columns = gate_MN.shape
    maxima = _empty_maxima(gate_MN.device)
    quantised_M2N = torch.empty(num_rows, 2 * num_columns, dtype=E5M2, device=gate_MN.device)
    words = _empty_words(2 * num_columns, num_rows, gate_MN.device)
    arguments = d_hidden_MN, gate_MN, up_MN, maxima
    sizes = num_rows, num_columns, gate_MN.stride(0)
    constants = {"largest": LARGEST[E5M2], "min_amax": MIN_AMAX, **MAXIMA, **TILE}
    layer_kernels.swiglu_backward_maxima[(MAXIMA["num_maxima"],)](*arguments, *sizes, **MAXIMA_BLOCK)
    grid = _cdiv(num_rows, TILE["rows"]), _cdiv(num_columns, TILE["columns"])
    layer_kernels.swiglu_backward[grid](*arguments, quantised_M2N, words, *sizes, **constants)
    return quantised_M2N, words.view(E5M2), _scale_behind(maxima, MAXIMA["num_maxima"])


def _cdiv(count: int, size: int) -> int:
    return -(-count // size)


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
