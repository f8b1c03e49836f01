"""Steps of the ZeRO engines apart from gradients: clipped AdamW, and sharded construction of the model."""

import pytest
import torch

from tests.cases import global_batch, own_share, small_config
from tests.ranks import run_ranks
from tests.reference import reference_model, reference_step, relative_error


def _update_errors(kind: str) -> dict[str, float]:
    """Returns the relative error of each parameter's change over four steps, against float64 AdamW with clipping."""
    from deepspeed.utils import safe_get_full_fp32_param

    from megamtp.engines.base import count_targets
    from megamtp.engines.zero import ZeroEngine

    config = small_config(
        engine__kind=kind,
        optimizer__beta1=0.8,
        optimizer__beta2=0.9,
        optimizer__eps=1e-3,
        optimizer__weight_decay=0.3,
        optimizer__gradient_clipping=0.4,
    )
    engine, model = ZeroEngine(config), reference_model(config)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-3)
    for step, lr in enumerate([1e-2, 3e-2, 1e-2, 2e-2]):
        batches = global_batch(config, step, 2)
        own = own_share(batches, engine.rank, 2)
        norm = engine.train_batch(own, count_targets(own, True, 2, engine.device), lr).gradient_norm
        reference_step(config, model, batches)
        expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4).item()
        assert expected_norm > 0.4  # otherwise nothing is clipped
        assert norm == pytest.approx(expected_norm, rel=1e-4)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
    return {
        name: relative_error(safe_get_full_fp32_param(sharded) - start[name].float(), parameter.detach() - start[name])
        for (name, parameter), sharded in zip(model.named_parameters(), engine.model.parameters(), strict=True)
    }


@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_steps_are_clipped_adamw(kind):
    for errors in run_ranks(_update_errors, 2, kind):
        assert max(errors.values()) < 1e-3, errors


def _sizes_before_the_engine_is_built() -> list[tuple[int, int]]:
    """Returns (elements on this rank, elements of the whole) of every parameter when DeepSpeed gets the model."""
    import deepspeed

    from megamtp.engines import zero

    sizes = []
    initialize = deepspeed.initialize

    def recording_initialize(**arguments):
        for parameter in arguments["model"].parameters():
            sizes.append((parameter.ds_tensor.numel() + parameter.numel(), parameter.ds_numel))
        return initialize(**arguments)

    deepspeed.initialize = recording_initialize
    zero.ZeroEngine(small_config(engine__kind="zero3"))
    return sizes


def test_no_rank_ever_holds_the_whole_model():
    for sizes in run_ranks(_sizes_before_the_engine_is_built, 2):
        assert len(sizes) > 40
        assert all(held == -(-whole // 2) for held, whole in sizes)
