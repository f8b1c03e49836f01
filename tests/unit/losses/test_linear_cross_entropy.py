"""The fused loss: values and gradients against float64, options, 16-bit gradients, and memory for logits."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megamtp.losses.float8 import Float8Weight
from megamtp.losses.linear_cross_entropy import SharedGradient, linear_cross_entropy
from megamtp.targets import IGNORED
from tests.reference import relative_error

ROWS, DIM, VOCABULARY = 23, 16, 37


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    targets[torch.rand(ROWS, generator=generator) < 0.3] = IGNORED
    return hidden, weight, targets


def reference(hidden, weight, targets, scale, z_loss):
    """Returns (loss, nll sum) from float64 logits and ordinary autograd."""
    logits = hidden.double() @ weight.double().T
    nll = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    z = (logits.logsumexp(-1).square() * (targets != IGNORED)).sum()
    return scale * (nll + z_loss * z), nll


def test_loss_of_one_row_computed_by_hand():
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss, nll = linear_cross_entropy(hidden, weight, torch.tensor([0]), scale=2.0)
    assert nll.item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert loss.item() == pytest.approx(2 * nll.item())


@pytest.mark.parametrize("chunk_rows", [1, 7, ROWS, 100])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_plain_autograd(chunk_rows, z_loss):
    hidden, weight, targets = inputs()
    expected, expected_nll = reference(hidden, weight, targets, 0.3, z_loss)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    loss, nll = linear_cross_entropy(hidden, weight, targets, scale=0.3, z_loss=z_loss, chunk_rows=chunk_rows)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, expected_nll)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-13)


def test_backward_may_receive_another_gradient_than_announced():
    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(reference(hidden, weight, targets, 1.0, 0.0)[0] * 5, (hidden, weight))
    loss, _ = linear_cross_entropy(hidden, weight, targets, loss_gradient=1024.0)
    for gradient, expected_gradient in zip(torch.autograd.grad(loss * 5, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_known_loss_gradient_changes_no_bit_and_is_not_read_in_backward(dtype):
    hidden, weight, targets = inputs(dtype)
    gradients = []
    for is_known, received in ((False, 8.0), (True, 8.0), (True, float("nan"))):
        loss, _ = linear_cross_entropy(
            hidden, weight, targets, scale=0.3, loss_gradient=8.0, loss_gradient_is_known=is_known
        )
        gradients.append(torch.autograd.grad(loss, (hidden, weight), torch.full_like(loss, received)))
    for with_known_gradient in gradients[1:]:
        assert all(map(torch.equal, with_known_gradient, gradients[0]))


def test_loss_gradient_keeps_small_fp16_gradients_from_underflowing():
    """Gradients of a loss scaled by 2^-22 underflow in fp16 unless they are multiplied before the cast."""
    hidden, weight, targets = inputs(torch.float16)
    scale, loss_gradient = 2.0**-22, 2.0**16
    scaled_loss, _ = reference(hidden, weight, targets, scale * loss_gradient, 0.0)
    expected = torch.autograd.grad(scaled_loss, hidden)[0].double()
    loss, _ = linear_cross_entropy(hidden, weight, targets, scale=scale, loss_gradient=loss_gradient)
    (gradient,) = torch.autograd.grad(loss, hidden, torch.tensor(loss_gradient))
    assert relative_error(gradient, expected) < 2e-2
    loss, _ = linear_cross_entropy(hidden, weight, targets, scale=scale)
    (underflowed,) = torch.autograd.grad(loss, hidden, torch.tensor(loss_gradient))
    assert relative_error(underflowed, expected) > 0.1


def test_all_ignored_gives_zero_loss_and_gradients():
    hidden, weight, targets = inputs()
    loss, nll = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED), z_loss=1.0)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == nll.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("float8_weight", [None, Float8Weight()])
def test_without_rows_the_loss_is_zero(float8_weight):
    hidden, weight = (
        torch.empty(0, 16, dtype=torch.bfloat16, requires_grad=True),
        torch.ones(32, 16, dtype=torch.bfloat16),
    )
    loss, nll = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long), float8_weight=float8_weight)
    assert loss == nll == 0
    assert torch.autograd.grad(loss, hidden)[0].shape == (0, 16)


def test_large_logits_do_not_overflow():
    hidden, weight, targets = inputs(torch.float32)
    loss, _ = linear_cross_entropy(hidden * 1e4, weight, targets)
    torch.testing.assert_close(loss.double(), reference(hidden * 1e4, weight, targets, 1.0, 0.0)[0], rtol=1e-5, atol=0)


def test_bf16_gradients():
    """bf16 has 8 bits: rounding at 2^-9 in the softmax gradient and again in the result gives about 0.4 %."""
    hidden, weight, targets = inputs(torch.bfloat16)
    expected = torch.autograd.grad(reference(hidden, weight, targets, 1.0, 0.0)[0], (hidden, weight))
    loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_rows=5)
    assert loss.dtype == torch.float32
    for gradient, expected_gradient in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient, expected_gradient.double()) < 8e-3


def test_uses_of_one_weight_share_its_gradient():
    """Only the last of three uses returns dW, the sum over all three."""
    hidden, weight, targets = inputs()
    losses = [reference(hidden * k, weight, targets, 1.0, 0.0)[0] for k in (1, 2, 3)]
    (expected,) = torch.autograd.grad(sum(losses), weight)
    shared = SharedGradient(num_uses=3)
    for k in (1, 2, 3):
        loss, _ = linear_cross_entropy(hidden * k, weight, targets, shared_gradient=shared)
        loss.backward()
        assert (weight.grad is None) == (k < 3)
    torch.testing.assert_close(weight.grad, expected)
    assert shared.total_VD is None


def test_no_gradient_is_computed_under_no_grad():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        shared = SharedGradient(num_uses=1)
        loss, _ = linear_cross_entropy(hidden, weight, targets, shared_gradient=shared)
    assert not loss.requires_grad
    assert shared.total_VD is None


class VocabularyMemory(TorchDispatchMode):
    """Records the peak memory, in elements, of tensors with a vocabulary-sized dimension and at least two rows.

    Unembedding weights and their gradients, of shape [V, D], do not count.
    """

    def __init__(self, vocabulary: int, dim: int):
        super().__init__()
        self.vocabulary, self.dim = vocabulary, dim
        self.live_elements: dict[int, int] = {}
        self.peak = self.num_tensors = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor)
        self.peak = max(self.peak, sum(self.live_elements.values()))
        return result

    def _watch(self, tensor) -> None:
        shape = tuple(tensor.shape)
        if self.vocabulary not in shape or shape in ((self.vocabulary, self.dim), (self.dim, self.vocabulary)):
            return
        if tensor.numel() < 2 * self.vocabulary:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live_elements:
            self.num_tensors += 1
            self.live_elements[storage._cdata] = storage.nbytes() // tensor.element_size()
            weakref.finalize(storage, self.live_elements.pop, storage._cdata, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["sequential", "deferred"])
def test_at_most_two_chunks_of_logits_exist_at_a_time(dtype, schedule):
    from megamtp.config import HeadLossConfig, ModelConfig
    from megamtp.model.mtp import MTPModel

    chunk_rows, vocabulary, dim = 8, 1009, 16
    config = ModelConfig(dim=dim, num_layers=4, num_future_tokens=3, num_attention_heads=2, vocab_size=vocabulary)
    model = MTPModel(config, HeadLossConfig(chunk_rows=chunk_rows), schedule=schedule).to(dtype)
    tokens, targets = torch.randint(vocabulary, (2, 40)), torch.randint(vocabulary, (3, 2, 40))
    with VocabularyMemory(vocabulary, dim) as memory:
        model(tokens, targets, [1.0] * 3)[0].backward()
    assert memory.num_tensors >= 3 * 80 // chunk_rows
    assert memory.peak <= 2 * chunk_rows * vocabulary
