"""The kernels around fp8 products equal torch's formulas, and a compiled layer in fp8 equals an eager one.

Run with: bash launch/test.sh tests/gpu/test_operations.py
"""

import pytest
import torch
from torch import Tensor

from megamtp.config import ModelConfig
from megamtp.model.layers import LayerOptions
from megamtp.model.mtp import MTPModel
from megamtp.precision import operations
from megamtp.precision.operations import E4M3, E5M2
from megamtp.precision.weights import WeightQuantiser
from tests.float8_cases import NEEDS_FLOAT8
from tests.reference import relative_error

pytestmark = NEEDS_FLOAT8
SHAPES = [(256, 192), (308, 1040), (2048, 4096)]  # the second has tiles that are not full in either direction


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _compare(on_gpu: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Quantised matrices may differ in a few ties, because a scale may differ in its last bit; nothing else may."""
    assert len(on_gpu) == len(expected)
    for actual, exact in zip(on_gpu, expected, strict=True):
        assert actual.dtype == exact.dtype and actual.shape == exact.shape
        if exact.dtype in (E4M3, E5M2):
            different = (actual.cpu().float() != exact.float()).float().mean()
            assert different < 1e-3
            largest_error = (actual.cpu().float() - exact.float()).abs() - exact.float().abs() * 2**-2
            assert largest_error.max() <= 2**-9  # one spacing, also among subnormal numbers of e4m3
        else:
            torch.testing.assert_close(
                actual.cpu(), exact, rtol=2**-7 if exact.dtype == torch.bfloat16 else 1e-5, atol=0
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_quantisation_with_transpose(shape):
    pieces = [_random(*shape), 2 * _random(*shape, seed=1), _random(*shape, seed=2)[:, :48]]
    for dtype in (E4M3, E5M2):
        for count in (1, 2, 3):
            quantised, transposed, scale = operations.quantise_with_transpose([p.cuda() for p in pieces[:count]], dtype)
            _compare((quantised, scale), operations.quantise_with_transpose(pieces[:count], dtype)[::2])
            assert torch.equal(transposed.view(torch.uint8), quantised.view(torch.uint8).T)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_numbers_that_are_not_finite_reach_the_matrix_and_its_transpose(bad, dtype):
    """Infinity makes the scale infinite: finite numbers become 0, and infinity NaN. Zeros stay zeros."""
    x = torch.full((64, 64), bad, dtype=torch.bfloat16) if bad == 0 else _random(64, 64)
    x[2, 3] = bad
    quantised, transposed, scale = operations.quantise_with_transpose([x.cuda()], dtype)
    assert torch.equal(transposed.view(torch.uint8), quantised.view(torch.uint8).T)
    restored = quantised.float() * scale
    assert restored.any().item() is (bad != 0) and restored[2, 3].isfinite().item() is (bad == 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_transpose(shape):
    matrices = [
        _random(*shape).to(E4M3),
        _random(*shape, seed=1).to(E4M3)[: shape[0] // 8 * 4],
        _random(44, shape[1]).to(E4M3),
    ]
    for count in (1, 2, 3):
        pieces = [matrix.cuda() for matrix in matrices[:count]]
        transposed = operations.transpose(pieces, after=pieces[0])
        assert torch.equal(transposed.view(torch.uint8), torch.cat([p.view(torch.uint8) for p in pieces]).T)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape):
    x, gradient, residual, added = (_random(*shape, seed=seed) for seed in range(4))
    weight = 1 + 0.1 * _random(shape[1], seed=4)
    for addend in (added, None):
        expected = operations.norm_quantise(x, weight, 1e-5, addend)
        on_gpu = None if addend is None else addend.cuda()
        total, *others = operations.norm_quantise(x.cuda(), weight.cuda(), 1e-5, on_gpu)
        assert torch.equal(total.cpu(), expected[0])
        _compare(tuple(others), expected[1:])
    reciprocal_rms = expected[-1]
    arguments = gradient, x, weight, reciprocal_rms, residual
    d_x, d_weight = operations.norm_backward(*(tensor.cuda() for tensor in arguments))
    expected_d_x, expected_d_weight = operations.norm_backward(*arguments)
    assert relative_error(d_x.cpu(), expected_d_x.double()) < 1e-3  # few roundings to another bf16 number
    assert relative_error(d_weight.cpu(), expected_d_weight.double()) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape):
    rows, columns = shape
    gate_up, gradient = _random(rows, 2 * columns), _random(rows, columns, seed=1)
    on_gpu, halves = gate_up.cuda().split(columns, 1), gate_up.split(columns, 1)
    for actual, expected in (
        (operations.swiglu_quantise(*on_gpu), operations.swiglu_quantise(*halves)),
        (operations.swiglu_backward(gradient.cuda(), *on_gpu), operations.swiglu_backward(gradient, *halves)),
    ):
        quantised, transposed, scale = actual
        _compare((quantised, scale), expected[::2])
        assert torch.equal(transposed.view(torch.uint8), quantised.view(torch.uint8).T)


def test_weights_equal_those_of_the_cpu():
    shapes = [(48, 64), (16, 64), (4096, 1024), (3, 5)]
    weights = [_random(*shape, seed=seed) * 2**-seed for seed, shape in enumerate(shapes)]
    groups, results = [0, 0, 1, 2], []
    for device in ("cpu", "cuda"):
        sources = [weight.to(device, copy=True) for weight in weights]
        targets = [torch.zeros_like(source, dtype=E4M3) for source in sources]
        quantiser = WeightQuantiser(sources, targets, groups, torch.device(device))
        quantiser.update()
        sources[1].mul_(100)  # a second update has new scales
        quantiser.update()
        results.append((*targets, *quantiser.scales))
    _compare(results[1], results[0])


def test_compiled_layers_are_as_accurate_as_eager_ones():
    """They round some operations to other bf16 numbers, and then to other fp8 numbers, so they cannot be equal."""
    config = ModelConfig(dim=256, num_layers=3, num_future_tokens=1, num_attention_heads=2, vocab_size=512)
    gradients = []
    for options in (LayerOptions(), LayerOptions(float8=True), LayerOptions(compiled=True, float8=True)):
        model = MTPModel(config, options=options).bfloat16()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter.dim() == 1) + 0.05 * torch.randn(parameter.shape, generator=generator))
        model.cuda().quantise_weights()
        tokens = torch.randint(512, (2, 257), generator=generator).cuda()
        model(tokens[:, :-1], tokens[:, 1:][None], [1.0])[0].backward()
        gradients.append({name: parameter.grad.double() for name, parameter in model.named_parameters()})
    in_bf16, eager, compiled = gradients
    for name, exact in in_bf16.items():
        eager_error, compiled_error = relative_error(eager[name], exact), relative_error(compiled[name], exact)
        assert 0 < compiled_error < 1.2 * eager_error + 0.01, name
        assert eager_error < 0.5, name
