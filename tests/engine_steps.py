"""Steps of an engine whose gradients are kept for comparison."""

import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from megamtp.config import Config
from megamtp.data.loader import Batch
from megamtp.engines.base import StepResult, count_targets
from megamtp.engines.zero import ZeroEngine
from tests.cases import global_batch, own_share
from tests.reference import reference_model, reference_step, relative_error


def step_with_gradients(
    engine: ZeroEngine, batches: list[Batch], lr: float = 0.0
) -> tuple[StepResult, list[int], dict[str, Tensor]]:
    """One train_batch over this rank's share of `batches`: its result, the target counts, every parameter's whole gradient."""
    gradients: dict[str, Tensor] = {}
    own = own_share(batches, engine.rank, engine.world_size)
    counts = count_targets(own, True, engine.world_size, engine.device)
    take_step = engine.engine.step

    def keep_gradients_and_step() -> None:
        if engine.engine.is_gradient_accumulation_boundary():
            loss_scale = getattr(engine.engine.optimizer, "loss_scale", 1)
            for name, parameter in engine.model.named_parameters():
                gradients[name] = safe_get_full_grad(parameter).cpu() / loss_scale
        take_step()

    engine.engine.step = keep_gradients_and_step
    try:
        return engine.train_batch(own, counts, lr), counts, gradients
    finally:
        del engine.engine.step


def largest_errors(config: Config, engine: ZeroEngine, num_steps: int) -> tuple[float, float]:
    """(gradients', losses') largest relative error against the float64 reference over some steps at learning rate 0.

    The first steps record ZeRO-3's trace, the later ones prefetch by it; both must be right.
    """
    model, accumulation = reference_model(config), config.accumulation(engine.world_size)
    gradient_error = loss_error = 0.0
    for step in range(num_steps):
        batches = global_batch(config, step, accumulation * engine.world_size)
        expected = reference_step(config, model, batches)
        result, counts, gradients = step_with_gradients(engine, batches)
        assert gradients.keys() == expected.gradients.keys()
        gradient_error = max(gradient_error, *(relative_error(gradients[name], expected.gradients[name]) for name in gradients))
        nll_sums = result.nll_sums.double()
        dist.all_reduce(nll_sums)
        for nll, count, loss in zip(nll_sums.tolist(), counts, expected.losses, strict=True):
            loss_error = max(loss_error, abs(nll / count - loss) / loss)
    return gradient_error, loss_error
