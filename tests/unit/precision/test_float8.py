"""Products of a layer in fp8: against float64 with the same quantised operands, and against bf16."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamtp.config import ModelConfig
from megamtp.model import layers
from megamtp.model.layers import LayerOptions, TransformerLayer
from megamtp.precision import float8
from megamtp.precision.float8 import QuantisedWeights
from megamtp.precision.operations import E5M2, norm_quantise, quantise, swiglu_backward, swiglu_quantise
from tests.reference import relative_error

ROWS, DIM, HIDDEN, EPS = 48, 64, 96, 1e-5
# Operands are equal, products of two fp8 numbers are exact in fp32, and sums have at most 96 terms: what remains is the
# rounding of each result to bf16, 2^-9 at most. Results that are quantised again may then round to another fp8 number:
# some 1 % of them, by 2^-2.5 in e5m2, as in tests/distributed/test_float8_layers.py.
BOUND, BOUND_IF_QUANTISED_AGAIN = 2**-8, 0.03


def _random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def _restored(quantised: tuple[Tensor, Tensor]) -> Tensor:
    return quantised[0].double() * quantised[1].double()


def _quantised(*weights: Tensor, together: bool = True) -> QuantisedWeights:
    matrix, scale = quantise(torch.cat([weight.detach() for weight in weights]))
    return QuantisedWeights((matrix,) if together else matrix.split([len(weight) for weight in weights]), scale)


def _restored_weights(quantised: QuantisedWeights) -> Tensor:
    return torch.cat([matrix.double() for matrix in quantised.matrices]) * quantised.scale.double()


def test_linear():
    x, weight, gradient = _random(ROWS, DIM), _random(HIDDEN, DIM, seed=1), _random(ROWS, HIDDEN, seed=2)
    quantised = _quantised(weight)
    x.requires_grad_(), weight.requires_grad_()
    (output,) = float8.linears(x.view(2, ROWS // 2, DIM), (weight,), quantised)
    output.backward(gradient.view_as(output))
    x8, weight8, gradient8 = (
        _restored(quantise(x.detach())),
        _restored_weights(quantised),
        _restored(quantise(gradient, E5M2)),
    )
    assert relative_error(output.view(ROWS, HIDDEN), x8 @ weight8.T) < BOUND
    assert relative_error(x.grad, gradient8 @ weight8) < BOUND
    assert relative_error(weight.grad, gradient8.T @ x8) < BOUND


@pytest.mark.parametrize("together", [True, False])
def test_norm_and_linears(together):
    x, norm = _random(ROWS, DIM), 1 + _random(DIM, seed=1, size=0.2)
    weights = [_random(size, DIM, seed=size) for size in (DIM, 32, 32)]
    gradients = [_random(ROWS, DIM, seed=5), *(_random(ROWS, size, seed=size + 1) for size in (DIM, 32, 32))]
    quantised = _quantised(*weights, together=together)
    for tensor in (x, norm, *weights):
        tensor.requires_grad_()
    outputs = float8.norm_linears(x, norm, tuple(weights), EPS, quantised)
    torch.autograd.backward(outputs, gradients)
    normed8 = _restored(norm_quantise(x.detach(), norm.detach(), EPS)[1:3])
    weights8, gradient8 = _restored_weights(quantised), _restored(quantise(torch.cat(gradients[1:], 1), E5M2))
    assert torch.equal(outputs[0], x)
    assert relative_error(torch.cat(outputs[1:], 1), normed8 @ weights8.T) < BOUND
    assert relative_error(torch.cat([weight.grad for weight in weights]), gradient8.T @ normed8) < BOUND
    exact_x, exact_norm = (tensor.detach().double().requires_grad_() for tensor in (x, norm))
    F.rms_norm(exact_x, (DIM,), exact_norm, EPS).backward(gradient8 @ weights8)
    assert relative_error(x.grad, exact_x.grad + gradients[0].double()) < BOUND
    assert relative_error(norm.grad, exact_norm.grad) < BOUND


def test_norm_and_mlp():
    x, added, gradient = (_random(ROWS, DIM, seed=seed) for seed in (0, 6, 2))
    norm = 1 + _random(DIM, seed=1, size=0.2)
    gate, up = (_random(HIDDEN, DIM, seed=seed, size=0.2) for seed in (3, 4))
    down = _random(DIM, HIDDEN, seed=5, size=0.2)
    gate_up8, down8 = _quantised(gate, up), _quantised(down)
    for tensor in (x, added, norm, gate, up, down):
        tensor.requires_grad_()
    output = float8.add_norm_mlp(x, added, norm, gate, up, down, EPS, gate_up8, down8)
    output.backward(gradient)
    total, *normed_and_scale, _ = norm_quantise(x.detach(), norm.detach(), EPS, added.detach())
    assert torch.equal(total, x + added)
    normed8 = _restored(normed_and_scale)
    halves = (normed8 @ _restored_weights(gate_up8).T).bfloat16().split(HIDDEN, 1)
    hidden8, gradient8 = _restored(swiglu_quantise(*halves)[::2]), _restored(quantise(gradient, E5M2))
    exact = total.double() + hidden8 @ _restored_weights(down8).T
    assert relative_error(output, exact) < BOUND
    assert relative_error(down.grad, gradient8.T @ hidden8) < BOUND_IF_QUANTISED_AGAIN
    d_halves8 = _restored(swiglu_backward((gradient8 @ _restored_weights(down8)).bfloat16(), *halves)[::2])
    assert relative_error(torch.cat((gate.grad, up.grad)), d_halves8.T @ normed8) < BOUND_IF_QUANTISED_AGAIN
    exact_x, exact_norm = (tensor.detach().double().requires_grad_() for tensor in (total, norm))
    F.rms_norm(exact_x, (DIM,), exact_norm, EPS).backward(d_halves8 @ _restored_weights(gate_up8))
    assert relative_error(x.grad, exact_x.grad + gradient.double()) < BOUND_IF_QUANTISED_AGAIN
    assert torch.equal(x.grad, added.grad)
    assert relative_error(norm.grad, exact_norm.grad) < BOUND_IF_QUANTISED_AGAIN


def _layer(float8: bool) -> TransformerLayer:
    config = ModelConfig(
        dim=DIM, num_layers=2, num_future_tokens=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=32
    )
    layer = TransformerLayer(config, LayerOptions(float8=float8)).bfloat16()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            norms = float(parameter.dim() == 1)
            parameter.copy_(norms + _random(*parameter.shape, seed=seed, size=0.1))
    for group in layer.weight_groups:
        weights = _quantised(*(layer.get_parameter(name) for name in group.names))
        group.quantised = QuantisedWeights(weights.matrices, weights.scale)
    return layer


def _gradients(layer: TransformerLayer, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer(x).backward(gradient)
    gradients = {name: parameter.grad.double() for name, parameter in layer.named_parameters()}
    return gradients | {"x": x.grad.double()}


def test_a_layers_gradients_point_where_those_in_bf16_do():
    x, gradient = _random(2, ROWS, DIM), _random(2, ROWS, DIM, seed=1)
    in_bf16, in_float8 = (_gradients(_layer(float8), x, gradient) for float8 in (False, True))
    cosines = {
        name: F.cosine_similarity(in_float8[name].flatten(), exact.flatten(), 0).item()
        for name, exact in in_bf16.items()
    }
    assert min(cosines.values()) > 0.98, cosines
    assert max(cosines.values()) < 1 - 1e-5  # fp8 products ran


def test_gradients_do_not_depend_on_the_factor_of_the_loss():
    """Scales follow the gradient, also far outside the range of fp8. A power of two changes nothing but the exponent.

    The bound is two roundings to bf16: torch's attention multiplies by a scale that is not a power of two.
    """
    x, gradient = _random(2, ROWS, DIM), _random(2, ROWS, DIM, seed=1)
    expected = _gradients(_layer(True), x, gradient)
    for factor in (2.0**-40, 2.0**40):
        for name, scaled in _gradients(_layer(True), x, gradient * factor).items():
            torch.testing.assert_close(scaled / factor, expected[name], rtol=2**-7, atol=2.0**-60, msg=name)


def test_recomputation_changes_no_bit():
    x, gradient = _random(2, ROWS, DIM), _random(2, ROWS, DIM, seed=1)
    layer = _layer(True)
    expected = _gradients(layer, x, gradient)
    layer.zero_grad()
    layer.options = LayerOptions(recompute=True, float8=True)
    for name, recomputed in _gradients(layer, x, gradient).items():
        assert torch.equal(recomputed, expected[name])


def test_gradients_in_e4m3_without_a_scale_are_wrong(monkeypatch):
    """A planted fault: the comparison with bf16 must notice it."""
    x, gradient = _random(2, ROWS, DIM), _random(2, ROWS, DIM, seed=1, size=1e-3)
    in_bf16 = _gradients(_layer(False), x, gradient)

    def without_scale(pieces, dtype):
        quantised = torch.cat(list(pieces), 1).to(torch.float8_e4m3fn)
        return quantised, quantised.T.contiguous(), torch.ones(1, 1)

    monkeypatch.setattr(float8, "quantise_with_transpose", without_scale)
    faulty = _gradients(_layer(True), x, gradient)
    name = "attention.output.weight"
    assert F.cosine_similarity(faulty[name].flatten(), in_bf16[name].flatten(), 0) < 0.9


def test_decoding_uses_the_weights_dtype():
    layer, x = _layer(True), _random(1, 8, DIM)
    expected, _ = layers.transformer_layer(x, layer.weights, layer._rotary(0, x), layer.head_dim, layer.eps)
    assert torch.equal(layer.extend(x, None)[0], expected)
