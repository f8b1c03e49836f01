"""Compares the fp8 loss with float64, with bounds that follow from the fp8 formats; for CPU and GPU tests."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamtp.losses.float8 import Float8Weight
from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.targets import IGNORED
from megamtp.training.preflight import FLOAT8_CAPABILITY

# Largest relative rounding error: half a spacing, 2^-4 in e4m3 and 2^-3 in e5m2. For numbers whose logarithm is uniform
# over a binade, the root mean square error is 0.42 of that.
E4M3_ERROR, E5M2_ERROR = 0.42 * 2**-4, 0.42 * 2**-3


NEEDS_FLOAT8 = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY,
        reason="no fp8 products on this GPU",
    ),
]


@dataclass(frozen=True)
class Case:
    """Random inputs whose logits have standard deviation `spread`; one seventh of the targets is IGNORED."""

    rows: int
    dim: int
    vocabulary: int
    chunk_rows: int
    spread: float
    z_loss: float = 0.0
    device: str = "cpu"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(self.rows, self.dim, generator=generator) * self.spread
        weight = torch.randn(self.vocabulary, self.dim, generator=generator) / self.dim**0.5
        targets = torch.randint(self.vocabulary, (self.rows,), generator=generator)
        targets[::7] = IGNORED
        hidden, weight = (matrix.to(self.device, torch.bfloat16).requires_grad_() for matrix in (hidden, weight))
        return hidden, weight, targets.to(self.device)

    def errors(self, float8: bool, factor: float = 0.01) -> tuple[float, float, float]:
        """Returns the errors of loss, dH and dW: absolute in nats per valid target for the loss, else relative."""
        hidden, weight, targets = self.inputs()
        logits = hidden.double() @ weight.double().T
        z = (logits.logsumexp(-1).square() * (targets != IGNORED)).sum()
        expected = factor * (F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED) + self.z_loss * z)
        expected_gradients = torch.autograd.grad(expected, (hidden, weight))
        loss, _ = linear_cross_entropy(
            hidden,
            weight,
            targets,
            scale=factor,
            z_loss=self.z_loss,
            chunk_rows=self.chunk_rows,
            float8_weight=Float8Weight() if float8 else None,
        )
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert not gradients[0][::7].any()
        per_target = factor * int((targets != IGNORED).sum())
        return abs(loss.item() - expected.item()) / per_target, *map(relative_error, gradients, expected_gradients)

    def bounds(self) -> tuple[float, float, float]:
        """Returns upper bounds of `errors` in fp8: expected root mean square errors plus a quarter.

        A logit is a sum of products of two e4m3 numbers, so its error is sqrt(2) times theirs. In the loss, the errors
        of the targets' logits average out (the bound allows three standard deviations), and the partition function
        keeps half the squared error of a logit. A probability's relative error is the absolute error of its logit and,
        in dH, the rounding error of e5m2; the -1 of the target is exact. dH also has the rounding error of W.
        """
        hidden, weight, targets = self.inputs()
        probabilities = (hidden.double() @ weight.double().T)[targets != IGNORED].softmax(-1)
        gradient = probabilities - F.one_hot(targets[targets != IGNORED], self.vocabulary)
        probability_share = (probabilities.norm() / gradient.norm()).item()
        logit_error = 2**0.5 * E4M3_ERROR * self.spread
        nll_error = logit_error**2 / 2 + 3 * logit_error / len(gradient) ** 0.5
        loss_error = (1 + 2 * self.z_loss * math.log(self.vocabulary)) * nll_error
        d_hidden_error = (E4M3_ERROR**2 + probability_share**2 * (logit_error**2 + E5M2_ERROR**2)) ** 0.5
        d_weight_error = probability_share * logit_error + 2**-9  # 2^-9: rounding of dW to bf16
        return 1.25 * loss_error, 1.25 * d_hidden_error, 1.25 * d_weight_error


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns |actual - expected| / |expected|, with norms over the whole tensor."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
