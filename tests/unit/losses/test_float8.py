"""The fp8 loss on a CPU, where the same casts and products run slowly: rounding, gradients, sharing of the weight's
copies.
"""

import weakref

import pytest
import torch

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.losses import float8
from megamtp.losses.float8 import Float8Weight, quantise
from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.losses.softmax_gradient import softmax_gradient_
from megamtp.model import part
from megamtp.model.mtp import MTPModel
from tests.float8_cases import Case, relative_error

CASES = [
    Case(131, 64, 512, chunk_rows, spread, z_loss)
    for chunk_rows in (48, 1000)
    for spread, z_loss in ((1.0, 0.0), (3.0, 1e-2))
]


def test_rounding_is_relative_and_the_largest_element_stays():
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3, 5] = -50.0
    transposed = torch.empty(24, 40, dtype=float8.WEIGHT)
    quantised, scale = quantise(x, transposed)
    assert quantised.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert torch.equal(transposed.float(), quantised.float().T)
    found = quantised.float() * scale
    assert found[3, 5].item() == pytest.approx(-50.0, rel=1e-6)
    normal = x.float().abs() > 2**-6 * scale
    assert normal.float().mean() > 0.9
    assert ((found - x.float()).abs() <= x.float().abs() * 2**-4).where(normal, True).all()
    assert ((found - x.float()).abs() <= 2**-10 * scale).where(~normal, True).all()


def test_zeros_stay_zeros_and_nan_stays_nan():
    quantised, scale = quantise(torch.zeros(3, 16, dtype=torch.bfloat16))
    assert not quantised.float().any() and torch.isfinite(scale) and scale > 0
    assert quantise(torch.full((3, 16), float("nan")).bfloat16())[0].float().isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients(case):
    for found, bound in zip(case.errors(float8=True), case.bounds(), strict=True):
        assert found < bound
    loss, *gradients = case.errors(float8=False)
    assert loss < case.bounds()[0] / 10
    assert max(gradients) < 8e-3  # as test_bf16_gradients
    assert case.errors(float8=True)[1] > 2 * max(gradients)  # it was fp8 that ran


def test_a_factor_beyond_fp8s_range_reaches_the_gradients():
    case = CASES[0]
    for factor in (1e-9, 1e9):
        for found, bound in zip(case.errors(float8=True, factor=factor)[1:], case.bounds()[1:], strict=True):
            assert found < bound


def test_the_tail_of_a_softmax_survives_in_e5m2_not_in_e4m3():
    """Zipf's law: the unembedding knows how frequent a token is, so rare tokens' parts of dH are small but add up."""
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
    for dtype, scale in ((float8.GRADIENT, float8.GRADIENT_SCALE), (torch.float8_e4m3fn, 2.0**8)):
        gradient, copy = logits.clone(), torch.empty_like(logits, dtype=dtype)
        softmax_gradient_(gradient, targets, 1.0, 0.0, copy, scale)
        errors[dtype] = relative_error((copy.float() / scale @ weight).mean(0), (gradient @ weight).mean(0))
    assert errors[torch.float8_e5m2] < 0.1
    assert errors[torch.float8_e4m3fn] > 0.2


@pytest.fixture
def model():
    """Makes a small model, with the same weights each time."""
    config = ModelConfig(dim=32, num_layers=4, num_future_tokens=3, num_attention_heads=2, vocab_size=96)

    def build(schedule="sequential", **options) -> MTPModel:
        made = MTPModel(config, HeadLossConfig(chunk_rows=24, **options), schedule).to(torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_((parameter.dim() == 1) + 0.2 * torch.randn(parameter.shape, generator=generator))
        return made

    return build


BATCH = torch.arange(40).view(2, 20) % 96, torch.arange(120).view(3, 2, 20) % 96, [1.0, 0.5, 0.25]


@pytest.fixture
def weights_made(monkeypatch):
    made = []

    def watched(x, transposed=None):
        made.extend([x.shape] if transposed is not None else [])
        return quantise(x, transposed)

    monkeypatch.setattr(float8, "quantise", watched)
    return made


@pytest.mark.parametrize("schedule", ["sequential", "deferred"])
@pytest.mark.parametrize("first_head", [True, False])
def test_heads_share_one_quantised_weight_in_each_micro_batch(model, weights_made, schedule, first_head):
    built = model(schedule, precision="fp8", fp8_first_head=first_head)
    for micro_batch in (1, 2):
        built(*BATCH)[0].backward()
        assert weights_made == [(96, 32)] * micro_batch
    _, losses = built(*BATCH)
    _, exact = model(schedule)(*BATCH)
    assert [a == b for a, b in zip(losses.tolist(), exact.tolist(), strict=True)] == [not first_head, False, False]


def test_schedules_agree(model):
    gradients = []
    for schedule in ("sequential", "deferred"):
        built = model(schedule, precision="fp8")
        built(*BATCH)[0].backward()
        gradients.append(torch.cat([parameter.grad.flatten().float() for parameter in built.parameters()]))
    assert relative_error(*gradients) < 8e-3  # dz is summed in fp32 or in bf16


def test_the_copies_are_gone_when_the_trunk_goes_back(model, monkeypatch):
    made = []

    class Watched(Float8Weight):
        def __init__(self):
            super().__init__()
            made.append(weakref.ref(self))

    monkeypatch.setattr(part, "Float8Weight", Watched)
    loss, _ = model(precision="fp8")(*BATCH)
    assert loss.requires_grad
    assert [weight() for weight in made] == [None]


def test_evaluation_stays_in_the_models_precision(model, weights_made):
    with torch.no_grad():
        found, exact = (model(precision=precision).eval()(*BATCH)[1] for precision in ("fp8", None))
    assert torch.equal(found, exact)
    assert not weights_made


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_one_gradient_wanted(wanted):
    hidden, weight, targets = CASES[0].inputs()
    expected = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, float8_weight=Float8Weight())[0], (hidden, weight)
    )
    other = weight if wanted == "hidden" else hidden
    other.requires_grad_(False)
    loss, _ = linear_cross_entropy(hidden, weight, targets, float8_weight=Float8Weight())
    (found,) = torch.autograd.grad(loss, hidden if wanted == "hidden" else weight)
    assert torch.equal(found, expected[0 if wanted == "hidden" else 1])
