"""The planted fault of tools/benchmarks/learning.py: which gradients are in e4m3 without a scale, and when it ends."""

import functools
import signal
from types import SimpleNamespace

import pytest
import torch
from benchmarks import unscaled_gradients
from torch import Tensor

from megamtp.config import ModelConfig
from megamtp.losses.float8 import GRADIENT_SCALE, Float8Products, Float8Weight
from megamtp.model import layers
from megamtp.model.layers import LayerOptions, TransformerLayer
from megamtp.precision import float8, operations
from megamtp.precision.float8 import QuantisedWeights
from megamtp.precision.operations import E4M3, E5M2, quantise
from megamtp.training.metrics import Metrics

ROWS, DIM = 32, 64


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def restored(matrix: Tensor, scale: Tensor) -> Tensor:
    return matrix.float() * scale


def test_gradients_are_cast_and_activations_are_not():
    pieces = [torch.tensor([[2.0**-11, 1000.0], [1.0, -1000.0]]), torch.tensor([[3.0], [float("nan")]])]
    cast, transposed, scale = unscaled_gradients.quantise_with_transpose(pieces, E5M2)
    expected = torch.tensor([[0.0, 448.0, 3.0], [1.0, -448.0, float("nan")]])
    assert cast.dtype == transposed.dtype == E4M3 and scale.shape == (1, 1) and scale.item() == 1
    torch.testing.assert_close(cast.float(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(transposed.float(), expected.T, rtol=0, atol=0, equal_nan=True)
    assert transposed.is_contiguous()
    pieces = [random(ROWS, DIM)]
    for own, other in zip(
        unscaled_gradients.quantise_with_transpose(pieces, E4M3),
        operations.quantise_with_transpose(pieces, E4M3),
        strict=True,
    ):
        assert torch.equal(own.float(), other.float())


def test_gradients_of_swiglu_are_cast():
    gradient, gate, up = (random(ROWS, DIM, seed=seed) for seed in range(3))
    expected = restored(*operations.swiglu_backward(gradient, gate, up)[::2])
    cast, transposed, scale = unscaled_gradients.swiglu_backward(gradient, gate, up)
    assert cast.dtype == E4M3 and scale.item() == 1
    assert torch.equal(transposed.float(), cast.float().T) and transposed.is_contiguous()
    # half a spacing of e4m3: relative for normal numbers, absolute below
    torch.testing.assert_close(cast.float(), expected, rtol=2**-4, atol=2**-10)
    assert not unscaled_gradients.swiglu_backward(gradient * 2**-16, gate, up)[0].float().any()


def test_gradients_of_the_losses_are_cast():
    def hidden_gradient(factor: float) -> Tensor:
        weight, gradient = random(48, DIM, size=0.1), random(ROWS, 48, seed=2).sign()
        products = Float8Weight().products(weight, random(ROWS, DIM, seed=1), factor)
        out = torch.empty(ROWS, DIM, dtype=torch.bfloat16)
        products.hidden_gradient((gradient * GRADIENT_SCALE).to(E5M2), out)
        return out.float()

    correct = hidden_gradient(0.5), hidden_gradient(1 / 8192)
    original = Float8Products.hidden_gradient
    with unscaled_gradients.planted():
        faulty = hidden_gradient(0.5), hidden_gradient(1 / 8192)
    torch.testing.assert_close(faulty[0], correct[0], rtol=2**-7, atol=0)
    assert correct[1].any() and not faulty[1].any()
    assert Float8Products.hidden_gradient is original


def layer_gradients(compiled: bool, size: float) -> dict[str, Tensor]:
    config = ModelConfig(dim=DIM, num_layers=2, num_future_tokens=1, num_attention_heads=2, vocab_size=32)
    layer = TransformerLayer(config, LayerOptions(float8=True, compiled=compiled)).bfloat16()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(float(parameter.dim() == 1) + random(*parameter.shape, seed=seed, size=0.1))
    for group in layer.weight_groups:
        matrix, scale = quantise(torch.cat([layer.get_parameter(name).detach() for name in group.names]))
        group.quantised = QuantisedWeights((matrix,), scale)
    layer(random(1, ROWS, DIM)).backward(random(1, ROWS, DIM, seed=1, size=size))
    return {name: parameter.grad.float() for name, parameter in layer.named_parameters()}


def test_layers_train_with_the_fault_also_when_compiled(monkeypatch):
    """A compiled layer has the same gradients. All gradients vanish if that of the output is small."""
    backend = functools.cache(
        lambda function, _: torch.compile(function, dynamic=False, fullgraph=True, backend="aot_eager")
    )
    monkeypatch.setattr(layers, "compiled", backend)
    with unscaled_gradients.planted():
        assert float8.swiglu_backward is unscaled_gradients.swiglu_backward  # the fault before it hides its own
        faulty, compiled = (layer_gradients(compiled, size=1.0) for compiled in (False, True))
        small = layer_gradients(False, size=2**-14)
    for name, gradient in faulty.items():
        torch.testing.assert_close(compiled[name], gradient, msg=name)
        assert gradient.any(), name
        assert not small[name].any(), name
    assert float8.swiglu_backward is operations.swiglu_backward
    assert all(gradient.any() for gradient in layer_gradients(False, size=2**-14).values())


@pytest.mark.parametrize(("step", "expected"), [(20, 20), (15, 20), (30, 30), (40, None)])
def test_a_training_ends_at_its_first_evaluation_from_the_step_on(step, expected, monkeypatch):
    """At its own last step it ends by itself."""
    asked, reported = [], []
    metrics = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(steps=40)))
    monkeypatch.setattr(Metrics, "report_evaluation", lambda metrics, step, losses: reported.append((step, losses)))
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.append(reported[-1][0]))
    try:
        with unscaled_gradients.ending_at(step):
            for evaluated in (10, 20, 30, 40):
                Metrics.report_evaluation(metrics, evaluated, [1.0])
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert reported == [(10, [1.0]), (20, [1.0]), (30, [1.0]), (40, [1.0])]
    assert (asked or [None])[0] == expected
