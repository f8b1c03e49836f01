"""Grouped gathers and reductions: DeepSpeed's own results bit for bit, memory that is used again, and nothing left
when removed.
"""

import warnings

import pytest
import torch
import torch.distributed as dist

from megamtp.engines.deepspeed.version import check_version
from megamtp.errors import InputError
from tests.cases import global_batch, own_share, small_config
from tests.ranks import run_ranks
from tests.reference import relative_error


def _three_steps(communication: str, world_size: int, settings: dict) -> dict[str, torch.Tensor]:
    """Weights, gradients' shards and losses after three steps with clipping and weight decay."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from megamtp.engines.base import count_targets
    from megamtp.engines.zero import ZeroEngine

    config = small_config(
        world_size,
        accumulation=2,
        engine__kind="zero3",
        engine__communication=communication,
        model__num_future_tokens=3,
        **settings,
    )
    engine = ZeroEngine(config)
    found = {}
    for step in range(3):
        own = own_share(global_batch(config, step, 2 * world_size), engine.rank, world_size)
        result = engine.train_batch(own, count_targets(own, True, world_size, engine.device), lr=1e-2)
        found[f"losses of step {step}"] = result.nll_sums
        found[f"norm of step {step}"] = torch.tensor(result.gradient_norm)
    for name, parameter in engine.model.named_parameters():
        found[name] = safe_get_full_fp32_param(parameter).clone()
        found[f"momentum of {name}"] = safe_get_full_optimizer_state(parameter, "exp_avg").clone()
    return found


# 97 x 16 weights and norms of 16 elements: padded at 3 ranks; at 4, shards of 4 elements. With 29 columns nothing
# divides.
SETTINGS = {
    "fp32": {},
    "bf16": {"train__precision": "bf16"},
    "padded": {"model__mlp_dim": 29, "engine__reduce_dtype": "bf16"},
    "persistent": {"engine__param_persistence_threshold": 100},
}


def _differences(world_size: int) -> dict[str, list[str]]:
    """For each of SETTINGS, what the two ways of communication disagree on; raises if there was little to compare."""
    differing = {}
    for name, settings in SETTINGS.items():
        grouped, shipped = (
            _three_steps(communication, world_size, settings) for communication in ("grouped", "deepspeed")
        )
        assert grouped.keys() == shipped.keys() and len(grouped) > 2 * 40
        differing[name] = [key for key in shipped if not torch.equal(grouped[key], shipped[key])]
    return differing


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_equals_deepspeeds_own_bit_for_bit(world_size):
    for differing in run_ranks(_differences, world_size, world_size, backend="ordered"):
        assert differing == {name: [] for name in SETTINGS}


def _offloaded_equals_resident() -> list[str]:
    """Names of what differs by more than the rounding of the gradient's norm, which AdamW enlarges where a gradient
    is near 0.
    """
    resident = _three_steps("grouped", 2, {})
    offloaded = _three_steps("grouped", 2, {"engine__offload_optimizer": True, "engine__offload_parameters": True})
    return [name for name in resident if relative_error(offloaded[name], resident[name]) > 1e-4]


def test_shards_in_cpu_memory_train_alike():
    for differing in run_ranks(_offloaded_equals_resident, 2):
        assert differing == []


def _buffers_of_steps() -> tuple[int, int, int]:
    """(buffers after 2 steps, after 5, weights still gathered at the end)."""
    from megamtp.engines.zero import ZeroEngine
    from tests.engine_steps import step_with_gradients

    config = small_config(engine__kind="zero3", model__num_layers=9, model__num_future_tokens=3)
    engine = ZeroEngine(config)
    gather = engine.communication.gatherer

    def number() -> int:
        return sum(len(free) for free in gather._free_buffers.values())

    numbers = []
    for step in range(5):
        step_with_gradients(engine, global_batch(config, step, 2))
        engine.evaluate(own_share(global_batch(config, 9, 2), engine.rank, 2))
        gather.release_all()
        numbers.append(number())
    return numbers[1], numbers[-1], sum(unit.buffer is not None for unit in gather._units)


def test_weights_live_in_few_buffers_that_are_used_again():
    """Nine layers need four buffers: a pinned head's or a running layer's, two on their way, one just left."""
    early, late, held = run_ranks(_buffers_of_steps, 2)[0]
    assert early == late <= 4 + 2  # and the embedding's and the unembedding's
    assert held == 0


def _names_of_works() -> set[str]:
    """What gloo calls the gathers of one step."""
    from megamtp.engines.deepspeed.gather import WeightGatherer

    names = set()
    gather = WeightGatherer._all_gather

    def note(*arguments) -> list[dist.Work]:
        works = gather(*arguments)
        names.update(str(work._get_op_type()).removeprefix("OpType.") for work in works)
        return works

    WeightGatherer._all_gather = note
    _three_steps("grouped", 2, {})
    return names


def test_gloo_works_have_short_names():
    """torch's gloo frees a longer name twice when its two threads end a work at the same time (see WeightGatherer._all_gather)."""
    names = run_ranks(_names_of_works, 2)[0]
    assert names and all(len(name) <= 15 for name in names), names


def _removed() -> tuple[list[bool], float]:
    """Whether each part was replaced and restored, and the largest error of any gradient after the removal."""
    from megamtp.engines.zero import ZeroEngine
    from tests.engine_steps import largest_errors

    config = small_config(engine__kind="zero3")
    engine = ZeroEngine(config)
    largest_errors(config, engine, num_steps=2)
    optimizer, communication = engine.deepspeed_engine.optimizer, engine.communication
    own = communication._replaced
    replaced = optimizer.parameter_offload.param_coordinator is not own[0]
    communication.remove()
    restored = [
        optimizer.parameter_offload.param_coordinator is own[0],
        optimizer.reduce_and_partition_stream is own[1],
        "independent_gradient_partition_epilogue" not in vars(optimizer),
    ]
    engine.communication = engine.head_phase.communication = None
    return [replaced, *restored], largest_errors(config, engine, num_steps=3)[0]


def test_removal_leaves_deepspeed_as_it_was():
    for places, error in run_ranks(_removed, 2):
        assert all(places)
        assert error < 1e-5


def _train_without_deprecated_calls() -> bool:
    from megamtp.engines.zero import ZeroEngine

    config = small_config(engine__kind="zero3")
    engine = ZeroEngine(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        result = engine.train_batch(
            own_share(global_batch(config, 0, 2), engine.rank, 2), [16] * len(config.head_weights), lr=1e-2
        )
    return bool(result.nll_sums.isfinite().all())


def test_gathers_are_called_by_names_that_torch_does_not_deprecate():
    assert run_ranks(_train_without_deprecated_calls, 2) == [True, True]


def test_another_deepspeed_is_refused_in_one_line():
    check_version("0.19.9")
    with pytest.raises(InputError) as error:
        check_version("0.20.1")
    assert "0.20.1" in str(error.value)
    assert "pip install" in str(error.value)
