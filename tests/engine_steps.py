"""Steps of an engine that record its gradients and compare them with the float64 reference."""

import math

import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import StepResult, count_targets
from megamtp.engines.pipeline import PipelineEngine
from megamtp.engines.zero import ZeroEngine
from tests.cases import global_batch, own_share
from tests.reference import Reference, reference_model, reference_step, relative_error


def step_with_gradients(
    engine: ZeroEngine | PipelineEngine, batches: list[Batch], lr: float = 0.0
) -> tuple[StepResult, list[int], dict[str, Tensor]]:
    """Runs train_batch on this rank's share of `batches`.

    Returns:
        (result, target counts, whole gradients of this rank's parameters by name).
    """
    gradients: dict[str, Tensor] = {}
    own = own_share(batches, engine.data_parallel_rank, engine.data_parallel_size)
    counts = count_targets(own, True, engine.data_parallel_size, engine.device)
    take_step = engine.deepspeed_engine._take_model_step

    def record_gradients_and_step(lr_kwargs: dict | None) -> None:
        loss_scale = getattr(engine.deepspeed_engine.optimizer, "loss_scale", 1)
        for name, parameter in engine.model.named_parameters():
            gradients[name] = safe_get_full_grad(parameter).cpu() / loss_scale
        take_step(lr_kwargs)

    engine.deepspeed_engine._take_model_step = record_gradients_and_step
    try:
        return engine.train_batch(own, counts, lr), counts, gradients
    finally:
        del engine.deepspeed_engine._take_model_step


def names_on_all_ranks(gradients: dict[str, Tensor]) -> set[str]:
    """Returns the names of the parameters of which any rank has a gradient. Collective."""
    names: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(names, list(gradients))
    return {name for rank_names in names for name in rank_names}


def largest_gradient_error(
    engine: ZeroEngine | PipelineEngine, gradients: dict[str, Tensor], expected: dict[str, Tensor]
) -> float:
    """Returns the largest relative error of this rank's gradients.

    The gradient of a slice (RowSlice of engines/stage.py) is compared with the same rows of the reference.
    """
    parameters, errors = dict(engine.model.named_parameters()), []
    for name, gradient in gradients.items():
        first = getattr(parameters[name], "first_element", 0)
        exact = expected[name].flatten()[first : first + gradient.numel()].view(gradient.shape)
        errors.append(relative_error(gradient, exact))
    return max(errors)


def largest_errors(config: Config, engine: ZeroEngine | PipelineEngine, num_steps: int) -> tuple[float, float]:
    """Returns the largest relative (gradient error, loss error) against the float64 reference.

    Runs `num_steps` steps at learning rate 0. Under ZeRO-3 the first steps record the order of fetches and later steps
    prefetch in that order; both kinds must be correct.
    """
    model, num_micro_batches = (
        reference_model(config),
        config.num_micro_batches(engine.data_parallel_size) * engine.data_parallel_size,
    )
    gradient_error = loss_error = 0.0
    for step in range(num_steps):
        batches = global_batch(config, step, num_micro_batches)
        _, *errors = errors_of_step(engine, batches, reference_step(config, model, batches))
        gradient_error, loss_error = max(gradient_error, errors[0]), max(loss_error, errors[1])
    return gradient_error, loss_error


def errors_of_step(
    engine: ZeroEngine | PipelineEngine, batches: list[Batch], expected: Reference
) -> tuple[list[int], float, float]:
    """Runs one step at learning rate 0.

    Returns:
        (target counts, largest relative error of the gradients and their norm, largest relative error of the losses).
    """
    result, counts, gradients = step_with_gradients(engine, batches)
    assert names_on_all_ranks(gradients) == expected.gradients.keys()
    nll_sums = result.nll_sums.double()
    dist.all_reduce(nll_sums)
    losses = zip(nll_sums.tolist(), counts, expected.losses, strict=True)
    loss_error = max(abs(nll / count - loss) / loss for nll, count, loss in losses)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.gradients.values()))
    norm_error = abs(result.gradient_norm - norm) / norm
    return counts, max(largest_gradient_error(engine, gradients, expected.gradients), norm_error), loss_error
