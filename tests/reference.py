"""The plain truth: one process, float64, ordinary autograd, the sum of the heads' cross-entropies."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.model.initial import initial_value
from megamtp.model.mtp import MTPModel
from megamtp.targets import IGNORED


@dataclass
class Reference:
    """losses [n]: mean negative log-likelihood of each head; gradients by parameter name; both float64."""

    losses: list[float]
    gradients: dict[str, Tensor]


def reference_model(config: Config, dtype: torch.dtype = torch.float64) -> MTPModel:
    """The model with the initial weights every engine starts from, rounded to `train.precision` as they are there."""
    model = MTPModel(config.model, config.head_loss, schedule="deferred").to(dtype)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config.model, config.train.seed).to(precision))
    return model


def reference_step(config: Config, model: MTPModel, micro_batches: list[Batch]) -> Reference:
    """Losses and gradients of one step over all micro-batches of all ranks."""
    n = config.model.num_future_tokens
    sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(n)], [0] * n
    for batch in micro_batches:
        for head, (logits, targets) in enumerate(zip(model.logits(batch.inputs), batch.targets, strict=True)):
            sums[head] = sums[head] + F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
            )
            counts[head] += int((targets != IGNORED).sum())
    means = [total / count if count else total * 0 for total, count in zip(sums, counts, strict=True)]
    model.zero_grad()
    sum(weight * mean for weight, mean in zip(config.head_weights, means, strict=True)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return Reference([float(mean) for mean in means], gradients)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, norms over the whole tensor."""
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
