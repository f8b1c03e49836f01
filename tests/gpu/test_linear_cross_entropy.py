"""The fused loss on a GPU: values and gradients against float64, and peak memory."""

import pytest
import torch
import torch.nn.functional as F

from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.targets import IGNORED
from tests.reference import relative_error

pytestmark = pytest.mark.gpu

ROWS, DIM, VOCABULARY = 3000, 512, 8000


def inputs(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, DIM, generator=generator).to("cuda", dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, DIM, generator=generator) / DIM**0.5).to("cuda", dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator).cuda()
    targets[::7] = IGNORED
    return hidden, weight, targets


# The softmax gradient is rounded to the model's dtype once (2^-9 or 2^-12), and its two products once more.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_float64(dtype, bound, z_loss):
    hidden, weight, targets = inputs(dtype)
    logits = hidden.double() @ weight.double().T
    z = (logits.logsumexp(-1).square() * (targets != IGNORED)).sum()
    expected = 0.01 * (F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED) + z_loss * z)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    loss, _ = linear_cross_entropy(hidden, weight, targets, scale=0.01, z_loss=z_loss, chunk_rows=700)
    assert abs(loss.item() / expected.item() - 1) < 1e-5
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected_gradient.double()) < bound


def test_peak_memory_is_one_chunk_of_logits():
    """Beside dH and one fp32 dW, the loss holds a chunk's logits in bf16 and a few vectors."""
    hidden, weight, targets = inputs(torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets, chunk_rows=500)[0].backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_rows=500)
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - 2 * weight.nbytes
    assert 500 * VOCABULARY * 2 <= extra < 500 * VOCABULARY * 2 * 1.1
    assert torch.isfinite(loss)
