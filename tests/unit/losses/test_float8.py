"""The fp8 loss on a CPU: rounding, gradients, and sharing of the quantised weight. The GPU kernels: tests/gpu."""

import weakref

import pytest
import torch

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.losses import float8
from megamtp.losses.float8 import Float8Weight
from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.losses.softmax_gradient import softmax_gradient_
from megamtp.model import part
from megamtp.model.mtp import MTPModel
from megamtp.precision.operations import E4M3, E5M2, quantise
from tests.float8_cases import Case, relative_error

CASES = [
    Case(131, 64, 512, chunk_rows, spread, z_loss)
    for chunk_rows in (48, 1000)
    for spread, z_loss in ((1.0, 0.0), (3.0, 1e-2))
]


def test_quantisation_keeps_relative_precision_and_the_largest_element():
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3, 5] = -50.0
    transposed = torch.empty(24, 40, dtype=E4M3)
    quantised, scale = quantise(x, E4M3, transposed)
    assert quantised.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert torch.equal(transposed.float(), quantised.float().T)
    restored = quantised.float() * scale
    assert restored[3, 5].item() == pytest.approx(-50.0, rel=1e-6)
    normal = x.float().abs() > 2**-6 * scale
    assert normal.float().mean() > 0.9
    assert ((restored - x.float()).abs() <= x.float().abs() * 2**-4).where(normal, True).all()
    assert ((restored - x.float()).abs() <= 2**-10 * scale).where(~normal, True).all()


def test_quantisation_keeps_zeros_and_nan():
    quantised, scale = quantise(torch.zeros(3, 16, dtype=torch.bfloat16))
    assert not quantised.float().any() and torch.isfinite(scale) and scale > 0
    assert quantise(torch.full((3, 16), float("nan")).bfloat16())[0].float().isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients(case):
    for error, bound in zip(case.errors(float8=True), case.bounds(), strict=True):
        assert error < bound
    loss, *gradients = case.errors(float8=False)
    assert loss < case.bounds()[0] / 10
    assert max(gradients) < 8e-3  # as in test_bf16_gradients
    assert case.errors(float8=True)[1] > 2 * max(gradients)  # shows that fp8 products ran


def test_gradients_are_accurate_for_factors_outside_the_range_of_fp8():
    case = CASES[0]
    for factor in (1e-9, 1e9):
        for error, bound in zip(case.errors(float8=True, factor=factor)[1:], case.bounds()[1:], strict=True):
            assert error < bound


def test_small_probabilities_survive_in_e5m2_but_not_in_e4m3():
    """With token frequencies as in Zipf's law, rare tokens contribute little to dH each, but much together."""
    generator = torch.Generator().manual_seed(0)
    rows, dim, vocabulary = 256, 64, 32000
    hidden, weight = (
        torch.randn(rows, dim, generator=generator),
        torch.randn(vocabulary, dim, generator=generator) * 0.2,
    )
    hidden[:, 0], weight[:, 0] = 4.0, -torch.arange(1, vocabulary + 1).log() / 4
    logits = hidden @ weight.T
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    errors = {}
    for dtype, scale in ((E5M2, float8.GRADIENT_SCALE), (torch.float8_e4m3fn, 2.0**8)):
        gradient, copy = logits.clone(), torch.empty_like(logits, dtype=dtype)
        softmax_gradient_(gradient, targets, 1.0, 0.0, copy, scale)
        errors[dtype] = relative_error((copy.float() / scale @ weight).mean(0), (gradient @ weight).mean(0))
    assert errors[torch.float8_e5m2] < 0.1
    assert errors[torch.float8_e4m3fn] > 0.2


@pytest.fixture
def build_model():
    """Returns a function that builds a small model, with the same weights each time."""
    config = ModelConfig(dim=32, num_layers=4, num_future_tokens=3, num_attention_heads=2, vocab_size=96)

    def build(schedule="sequential", **options) -> MTPModel:
        model = MTPModel(config, HeadLossConfig(chunk_rows=24, **options), schedule).to(torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter.dim() == 1) + 0.2 * torch.randn(parameter.shape, generator=generator))
        return model

    return build


BATCH = torch.arange(40).view(2, 20) % 96, torch.arange(120).view(3, 2, 20) % 96, [1.0, 0.5, 0.25]


@pytest.fixture
def quantised_shapes(monkeypatch):
    """Returns a list that receives the shape of each quantised weight."""
    shapes = []

    def recording_quantise(x, dtype=E4M3, transposed=None):
        shapes.extend([x.shape] if transposed is not None else [])
        return quantise(x, dtype, transposed)

    monkeypatch.setattr(float8, "quantise", recording_quantise)
    return shapes


@pytest.mark.parametrize("schedule", ["sequential", "deferred"])
@pytest.mark.parametrize("first_head", [True, False])
def test_heads_share_one_quantised_weight_per_micro_batch(build_model, quantised_shapes, schedule, first_head):
    model = build_model(schedule, precision="fp8", fp8_first_head=first_head)
    for num_micro_batches in (1, 2):
        model(*BATCH)[0].backward()
        assert quantised_shapes == [(96, 32)] * num_micro_batches
    _, losses = model(*BATCH)
    _, bf16_losses = build_model(schedule)(*BATCH)
    equal = [loss == bf16_loss for loss, bf16_loss in zip(losses.tolist(), bf16_losses.tolist(), strict=True)]
    assert equal == [not first_head, False, False]


def test_sequential_and_deferred_gradients_agree(build_model):
    gradients = []
    for schedule in ("sequential", "deferred"):
        model = build_model(schedule, precision="fp8")
        model(*BATCH)[0].backward()
        gradients.append(torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()]))
    assert relative_error(*gradients) < 8e-3  # sequential sums dz in fp32, deferred in bf16


def test_the_quantised_weight_is_freed_before_the_trunks_backward_pass(build_model, monkeypatch):
    references = []

    class ReferencedWeight(Float8Weight):
        def __init__(self):
            super().__init__()
            references.append(weakref.ref(self))

    monkeypatch.setattr(part, "Float8Weight", ReferencedWeight)
    loss, _ = build_model(precision="fp8")(*BATCH)
    assert loss.requires_grad
    assert [reference() for reference in references] == [None]


def test_evaluation_uses_the_models_precision(build_model, quantised_shapes):
    with torch.no_grad():
        losses, bf16_losses = (build_model(precision=precision).eval()(*BATCH)[1] for precision in ("fp8", None))
    assert torch.equal(losses, bf16_losses)
    assert not quantised_shapes


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_one_gradient_alone_equals_both_together(needed):
    hidden, weight, targets = CASES[0].inputs()
    expected = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, float8_weight=Float8Weight())[0], (hidden, weight)
    )
    other = weight if needed == "hidden" else hidden
    other.requires_grad_(False)
    loss, _ = linear_cross_entropy(hidden, weight, targets, float8_weight=Float8Weight())
    (gradient,) = torch.autograd.grad(loss, hidden if needed == "hidden" else weight)
    assert torch.equal(gradient, expected[0 if needed == "hidden" else 1])
