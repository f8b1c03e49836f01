"""The fp8 loss against float64, and bounds that follow from its formats; for CPUs and GPUs."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megamtp.losses.float8 import Float8Weight
from megamtp.losses.linear_cross_entropy import linear_cross_entropy
from megamtp.targets import IGNORED

# Rounding leaves at most half a spacing: 2^-4 of a number in e4m3, 2^-3 in e5m2. For numbers spread evenly over a
# binade (in their logarithm) the root mean square is 0.42 of that.
E4M3_ERROR, E5M2_ERROR = 0.42 * 2**-4, 0.42 * 2**-3


@dataclass(frozen=True)
class Case:
    """Logits have a standard deviation of `spread`; a seventh of the targets is ignored."""

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
        """Of the loss, absolute in nats per valid target; of dH and of dW, norm over norm."""
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
        """What `errors` may be in fp8: root mean squares, a quarter added, of the loss three of them.

        A logit is a sum of products of two numbers in e4m3, so its error is sqrt(2) times theirs. In the loss it
        averages out over the targets' logits, and half its square stays, in the partition function. A probability's
        relative error is its logit's absolute one, and e5m2's in dH; the target's -1 has none. To dH the rounding of W
        comes, whatever it is multiplied with.
        """
        hidden, weight, targets = self.inputs()
        probabilities = (hidden.double() @ weight.double().T)[targets != IGNORED].softmax(-1)
        gradient = probabilities - F.one_hot(targets[targets != IGNORED], self.vocabulary)
        share = (probabilities.norm() / gradient.norm()).item()
        logit = 2**0.5 * E4M3_ERROR * self.spread
        loss = (1 + 2 * self.z_loss * math.log(self.vocabulary)) * (logit**2 / 2 + 3 * logit / len(gradient) ** 0.5)
        hidden_gradient = (E4M3_ERROR**2 + share**2 * (logit**2 + E5M2_ERROR**2)) ** 0.5
        return 1.25 * loss, 1.25 * hidden_gradient, 1.25 * (share * logit + 2**-9)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
