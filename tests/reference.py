"""The reference for losses and gradients: one process, float64, ordinary autograd and cross-entropy."""

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
    """The float64 results of one step.

    Attributes:
        losses: mean negative log-likelihood of each head [n].
        gradients: by parameter name.
    """

    losses: list[float]
    gradients: dict[str, Tensor]


def reference_model(config: Config, dtype: torch.dtype = torch.float64) -> MTPModel:
    """Returns the model with the initial weights of every engine, rounded to `train.precision` as engines do."""
    model = MTPModel(config.model, config.head_loss, schedule="deferred").to(dtype)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config.model, config.train.seed).to(precision))
    return model


def reference_step(config: Config, model: MTPModel, micro_batches: list[Batch]) -> Reference:
    """Returns losses and gradients of one step over the micro-batches of all ranks."""
    n = config.model.num_future_tokens
    nll_sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(n)], [0] * n
    for batch in micro_batches:
        logits_of_heads = model.logits(batch.inputs, batch.following, batch.documents)
        for head, (logits, targets) in enumerate(zip(logits_of_heads, batch.targets, strict=True)):
            nll_sums[head] = nll_sums[head] + F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
            )
            counts[head] += int((targets != IGNORED).sum())
    means = [nll_sum / count if count else nll_sum * 0 for nll_sum, count in zip(nll_sums, counts, strict=True)]
    model.zero_grad()
    sum(weight * mean for weight, mean in zip(config.head_weights, means, strict=True)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return Reference([float(mean) for mean in means], gradients)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns |actual - expected| / |expected|, with norms over the whole tensor."""
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
