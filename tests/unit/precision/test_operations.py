"""Quantisation, alone and fused with norms and SwiGLU, on a CPU. tests/gpu/test_operations.py compares the kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamtp.precision import operations
from megamtp.precision.operations import E4M3, E5M2, LARGEST
from tests.reference import relative_error

HALF_SPACING = {E4M3: 2**-4, E5M2: 2**-3}  # relative, of normal numbers
SMALLEST_NORMAL = {E4M3: 2**-6, E5M2: 2**-14}
HALF_SUBNORMAL_SPACING = {E4M3: 2**-10, E5M2: 2**-17}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_numbers_are_rounded_to_the_nearest(dtype, magnitude):
    x = (_random(48, 32).double() * magnitude).bfloat16()
    quantised, transposed, scale = operations.quantise_with_transpose([x], dtype)
    assert quantised.dtype == transposed.dtype == dtype and scale.shape == (1, 1)
    assert torch.equal(transposed.float(), quantised.float().T)
    scaled = x.double() / scale.double()
    error = (quantised.double() - scaled).abs()
    is_normal = scaled.abs() >= SMALLEST_NORMAL[dtype]
    bound = (HALF_SPACING[dtype] * scaled.abs()).where(is_normal, HALF_SUBNORMAL_SPACING[dtype])
    assert (error <= bound * (1 + 1e-5)).all()
    assert quantised.float().abs().max() == LARGEST[dtype]


def test_several_matrices_side_by_side_have_one_scale():
    pieces = [_random(16, 32), 100 * _random(16, 48, seed=1), _random(16, 16, seed=2)]
    quantised, transposed, scale = operations.quantise_with_transpose(pieces, E5M2)
    whole, whole_scale = operations.quantise(torch.cat(pieces, 1), E5M2)
    assert torch.equal(quantised.float(), whole.float()) and torch.equal(scale, whole_scale)
    assert transposed.shape == (96, 16)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_zeros_stay_zeros(dtype):
    quantised, scale = operations.quantise(torch.zeros(16, 16, dtype=torch.bfloat16), dtype)
    assert not quantised.float().any() and torch.isfinite(scale) and scale > 0


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_one_outlier_costs_small_numbers_their_precision_but_never_overflows(dtype):
    x = _random(16, 64)
    x[3, 5] = 2.0**14
    quantised, scale = operations.quantise(x, dtype)
    restored = quantised.float() * scale
    assert restored[3, 5].item() == pytest.approx(2.0**14)
    others = torch.ones_like(x, dtype=torch.bool)
    others[3, 5] = False
    assert torch.isfinite(restored).all()
    # e4m3 spans 2^15 between its largest and its smallest normal number, e5m2 2^30.
    expected = {E4M3: 0.05, E5M2: 0.1}[dtype]
    assert relative_error(restored[others], x[others].double()) < expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_numbers_that_are_not_finite_reach_the_product(bad, dtype):
    x = _random(16, 16)
    x[2, 3] = bad
    quantised, scale = operations.quantise(x, dtype)
    right, right_scale = operations.quantise(_random(16, 16, seed=1))
    product = operations.scaled_product(quantised, scale, right, right_scale, torch.bfloat16, fast=True)
    assert not torch.isfinite(product[2]).any()


def test_a_product_of_huge_numbers_overflows_to_infinity_not_to_the_largest_number():
    x = torch.full((16, 16), 1e30, dtype=torch.bfloat16)
    quantised, scale = operations.quantise(x)
    assert operations.scaled_product(quantised, scale, quantised, scale, torch.bfloat16, fast=False).isinf().all()


def test_transpose():
    matrices = [_random(16, 32).to(E4M3), _random(48, 32, seed=1).to(E4M3)]
    transposed = operations.transpose(matrices, after=torch.zeros(1))
    assert torch.equal(transposed.float(), torch.cat([matrix.float() for matrix in matrices]).T)


@pytest.mark.parametrize("weight_size", [1e-3, 1.0, 30.0])
def test_the_norms_scale_is_a_bound(weight_size):
    """The largest normed number is sqrt(N) * weight: a row with one number that is not 0."""
    x, weight = _random(48, 64), weight_size * (1 + 0.2 * _random(64, seed=1))
    x[0] = 0.0
    x[0, weight.abs().argmax()] = 100.0
    _, quantised, scale, reciprocal_rms = operations.norm_quantise(x, weight, 1e-6)
    assert quantised.float().abs().max() == 448.0
    expected = F.rms_norm(x.double(), (64,), weight.double(), 1e-6)
    restored = quantised.double() * scale
    assert relative_error(restored, expected) < 0.04  # 0.42 * 2^-4 for e4m3, 2^-9 for bf16
    torch.testing.assert_close(reciprocal_rms.double(), (x.double().square().mean(1) + 1e-6).rsqrt(), rtol=1e-5, atol=0)


def test_a_norm_of_a_sum_equals_the_norm_of_its_rounded_total():
    x, added, weight = _random(16, 32), _random(16, 32, seed=1), 1 + 0.2 * _random(32, seed=2)
    total, *results = operations.norm_quantise(x, weight, 1e-6, added)
    assert torch.equal(total, x + added)
    _, *expected = operations.norm_quantise(x + added, weight, 1e-6)
    for result, expected_result in zip(results, expected, strict=True):
        assert torch.equal(result.float(), expected_result.float())


def test_the_norm_of_zeros_is_finite():
    _, quantised, scale, reciprocal_rms = operations.norm_quantise(
        torch.zeros(16, 32, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.bfloat16), 1e-6
    )
    assert not quantised.float().any() and torch.isfinite(scale) and torch.isfinite(reciprocal_rms).all()


def test_gradients_of_a_norm():
    x, gradient, residual = (_random(48, 64, seed=seed) for seed in range(3))
    weight = 1 + 0.2 * _random(64, seed=3)
    *_, reciprocal_rms = operations.norm_quantise(x, weight, 1e-5)
    d_x, d_weight = operations.norm_backward(gradient, x, weight, reciprocal_rms, residual)
    exact_x, exact_weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    F.rms_norm(exact_x, (64,), exact_weight, 1e-5).backward(gradient.double())
    assert relative_error(d_x, exact_x.grad + residual.double()) < 3e-3  # rounded to bf16 once
    assert relative_error(d_weight, exact_weight.grad) < 3e-3


def test_swiglu_and_its_gradients():
    gate_up, gradient = 2 * _random(48, 128), _random(48, 64, seed=1)
    exact_gate, exact_up = (half.double().requires_grad_() for half in gate_up.split(64, 1))
    exact = F.silu(exact_gate) * exact_up
    exact.backward(gradient.double())
    hidden, transposed, scale = operations.swiglu_quantise(*gate_up.split(64, 1))
    assert torch.equal(transposed.float(), hidden.float().T)
    assert relative_error(hidden.double() * scale, exact.detach()) < 0.03
    quantised, transposed, scale = operations.swiglu_backward(gradient, *gate_up.split(64, 1))
    assert torch.equal(transposed.float(), quantised.float().T)
    assert relative_error(quantised.double() * scale, torch.cat((exact_gate.grad, exact_up.grad), 1)) < 0.06
