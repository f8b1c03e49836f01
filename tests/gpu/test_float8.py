"""The fp8 loss on a GPU: kernels against torch's casts, gradients against float64, peak memory, and engines.

Run with: bash launch/test.sh tests/gpu/test_float8.py
"""

import itertools

import pytest
import torch

from megamtp.config import HeadLossConfig, ModelConfig
from megamtp.losses import float8
from megamtp.losses.float8 import Float8Weight
from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.losses.softmax_gradient import softmax_gradient_
from megamtp.model.mtp import MTPModel
from megamtp.precision.operations import E4M3, E5M2, quantise
from tests.cases import small_config
from tests.engine_steps import largest_errors
from tests.float8_cases import E4M3_ERROR, E5M2_ERROR, NEEDS_FLOAT8, Case
from tests.ranks import run_gpu_rank

pytestmark = NEEDS_FLOAT8

# They include chunks and last chunks whose rows are not a multiple of 16, and the largest vocabulary in use.
CASES = [
    Case(rows, dim, vocabulary, chunk_rows, spread, z_loss, "cuda")
    for (rows, dim, vocabulary, chunk_rows), (spread, z_loss) in itertools.product(
        [(3001, 512, 8000, 704), (3001, 512, 8000, 701), (2050, 1024, 128256, 2048)],
        [(1.0, 0.0), (3.0, 0.0), (3.0, 1e-2)],
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients(case):
    errors, bounds, bf16_errors = case.errors(float8=True), case.bounds(), case.errors(float8=False)
    print(f"fp8 {errors}\nbounds {bounds}\nbf16 {bf16_errors}")
    for error, bound in zip(errors, bounds, strict=True):
        assert error < bound
    assert bf16_errors[0] < bounds[0] / 10
    assert max(bf16_errors[1:]) < 8e-3
    assert errors[1] > 2 * max(bf16_errors[1:])  # shows that fp8 products ran


def test_the_quantising_kernel_equals_torchs_cast():
    """Except for a few ties: the kernel's division may differ from torch's in the last bit."""
    x = torch.randn(1000, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    transposed = torch.empty(400, 1000, dtype=E4M3, device="cuda")
    quantised, scale = quantise(x.cuda(), E4M3, transposed)
    expected, expected_scale = quantise(x)
    assert scale.item() == pytest.approx(expected_scale.item(), rel=1e-6)
    different = quantised.cpu().float() != expected.float()
    assert different.float().mean() < 1e-3
    assert ((quantised.cpu().float() - expected.float()).abs() <= expected.float().abs() * 2**-2).all()
    assert torch.equal(transposed.float(), quantised.float().T)
    zeros, scale = quantise(torch.zeros(48, 16, dtype=torch.bfloat16, device="cuda"))
    assert not zeros.float().any() and torch.isfinite(scale)
    assert quantise(torch.full((16, 16), float("nan"), device="cuda").bfloat16())[0].float().isnan().all()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_kernels_copy_equals_its_gradient(z_loss):
    """Divided by their factors, the copy and the gradient in place differ only by rounding.

    With and without a copy, the kernel is compiled separately. Fused operations may then round the gradient to
    neighbouring bf16 numbers.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(300, 40000, generator=generator)).to("cuda", torch.bfloat16)
    targets = torch.randint(40000, (300,), generator=generator).cuda()
    targets[::7] = -100
    without_copy, gradient, copy = logits.clone(), logits.clone(), torch.empty_like(logits, dtype=E5M2)
    softmax_gradient_(without_copy, targets, 0.3, z_loss)
    softmax_gradient_(gradient, targets, 0.3, z_loss, copy, float8.GRADIENT_SCALE)
    torch.testing.assert_close(without_copy, gradient, rtol=2**-7, atol=0)
    expected, from_copy = gradient.float() / 0.3, copy.float() / float8.GRADIENT_SCALE
    assert not from_copy[::7].any()
    assert ((from_copy - expected).abs() <= expected.abs() * (2**-3 + 2**-8) + 2**-29).all()


def test_four_heads_quantise_the_weight_once(monkeypatch):
    quantised_shapes = []

    def recording_quantise(x, transposed=None):
        quantised_shapes.extend([tuple(x.shape)] if transposed is not None else [])
        return quantise(x, E4M3, transposed)

    monkeypatch.setattr(float8, "quantise", recording_quantise)
    config = ModelConfig(dim=256, num_layers=6, num_future_tokens=4, num_attention_heads=4, vocab_size=32000)
    tokens = torch.randint(32000, (2, 260), device="cuda")
    targets = torch.stack([tokens[:, 1 + head : 257 + head] for head in range(4)])
    for schedule in ("sequential", "deferred"):
        model = MTPModel(config, HeadLossConfig(precision="fp8"), schedule).to("cuda", torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
        quantised_shapes.clear()
        loss, nll_sums = model(tokens[:, :256], targets, [1 / 512] * 4)
        loss.backward()
        assert quantised_shapes == [(32000, 256)]
        with torch.no_grad():
            _, bf16_nll_sums = model.eval()(tokens[:, :256], targets, [1 / 512] * 4)
        assert quantised_shapes == [(32000, 256)]
        assert not torch.equal(bf16_nll_sums, nll_sums)
        torch.testing.assert_close(nll_sums, bf16_nll_sums, rtol=2e-3, atol=0)


def test_peak_memory_is_a_chunk_in_24_bits_and_two_fp8_weights():
    """Beside dH and one fp32 dW. A tenth more is allowed for hidden states in fp8 and cuBLAS' workspace."""
    rows, dim, vocabulary, chunk_rows = 8192, 512, 32000, 4096
    hidden, weight, targets = Case(rows, dim, vocabulary, chunk_rows, 1.0, device="cuda").inputs()
    for _ in range(2):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows, float8_weight=Float8Weight())
        extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - 2 * weight.nbytes
        loss.backward()
    needed = 3 * chunk_rows * vocabulary + 2 * vocabulary * dim
    print(f"{extra / 2**20:.0f} MiB, {needed / 2**20:.0f} MiB expected")
    assert needed <= extra < 1.1 * needed


ENGINES = list(itertools.product(("zero1", "zero3"), ("sequential", "deferred")))
# As in tests/distributed/test_float8.py.
GRADIENT_BOUND, LOSS_BOUND = 0.04 + (E4M3_ERROR**2 + E5M2_ERROR**2) ** 0.5, 2e-3


def _engine_errors() -> dict[tuple, tuple[float, float]]:
    from megamtp.engines.zero import ZeroEngine

    errors = {}
    for kind, schedule in ENGINES:
        config = small_config(
            world_size=1,
            accumulation=2,
            engine__kind=kind,
            engine__head_schedule=schedule,
            model__num_future_tokens=4,
            model__dim=64,
            model__mlp_dim=64,
            model__vocab_size=112,
            train__precision="bf16",
            head_loss__precision="fp8",
        )
        errors[kind, schedule] = largest_errors(config, ZeroEngine(config), num_steps=3)
    return errors


@pytest.fixture(scope="module")
def errors_of_engines() -> dict[tuple, tuple[float, float]]:
    return run_gpu_rank(_engine_errors)


@pytest.mark.parametrize("case", ENGINES, ids=lambda case: "-".join(case))
def test_gradients_equal_the_reference(case, errors_of_engines):
    gradient_error, loss_error = errors_of_engines[case]
    print(f"gradients {gradient_error}, losses {loss_error}")
    assert gradient_error < GRADIENT_BOUND
    assert loss_error < LOSS_BOUND
