"""Grouped communication: the same bits as DeepSpeed's own communication, reused memory, and complete removal."""

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
    """Returns losses, gradient norms, weights and momentum of three steps with clipping and weight decay."""
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
    tensors = {}
    for step in range(3):
        own = own_share(global_batch(config, step, 2 * world_size), engine.rank, world_size)
        result = engine.train_batch(own, count_targets(own, True, world_size, engine.device), lr=1e-2)
        tensors[f"losses of step {step}"] = result.nll_sums
        tensors[f"norm of step {step}"] = torch.tensor(result.gradient_norm)
    for name, parameter in engine.model.named_parameters():
        tensors[name] = safe_get_full_fp32_param(parameter).clone()
        tensors[f"momentum of {name}"] = safe_get_full_optimizer_state(parameter, "exp_avg").clone()
    return tensors


# The weights of 97 x 16 elements and norms of 16 elements have padding on 3 ranks, and shards of 4 elements on 4 ranks.
# With 29 columns no number of ranks divides evenly.
SETTINGS = {
    "fp32": {},
    "bf16": {"train__precision": "bf16"},
    "padded": {"model__mlp_dim": 29, "engine__reduce_dtype": "bf16"},
    "persistent": {"engine__param_persistence_threshold": 100},
}


# Without --full, each of them runs with one number of ranks.
SETTINGS_OF_RANKS = {2: ("bf16", "persistent"), 3: ("fp32", "padded")}


def _differences(world_size: int, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns the names of the tensors that differ between the two kinds of communication, for each of `names`."""
    differing = {}
    for name in names:
        grouped, deepspeed = (
            _three_steps(communication, world_size, SETTINGS[name]) for communication in ("grouped", "deepspeed")
        )
        assert grouped.keys() == deepspeed.keys() and len(grouped) > 2 * 40
        differing[name] = [key for key in deepspeed if not torch.equal(grouped[key], deepspeed[key])]
    return differing


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.full)])
def test_equals_deepspeeds_communication_bit_for_bit(world_size, request):
    names = tuple(SETTINGS) if request.config.getoption("--full") else SETTINGS_OF_RANKS[world_size]
    for differing in run_ranks(_differences, world_size, world_size, names, backend="ordered"):
        assert differing == {name: [] for name in names}


def _differences_with_offload() -> list[str]:
    """Returns the names of the tensors that offloading changes by more than rounding.

    The gradient norm is rounded differently, and AdamW amplifies the difference where a gradient is close to 0.
    """
    on_device = _three_steps("grouped", 2, {})
    offloaded = _three_steps("grouped", 2, {"engine__offload_optimizer": True, "engine__offload_parameters": True})
    return [name for name in on_device if relative_error(offloaded[name], on_device[name]) > 1e-4]


def test_offloading_does_not_change_the_training():
    for differing in run_ranks(_differences_with_offload, 2):
        assert differing == []


def _buffers_of_steps() -> tuple[int, int, int]:
    """Returns (buffers after 2 steps, buffers after 5 steps, units whose weights are gathered at the end)."""
    from megamtp.engines.zero import ZeroEngine
    from tests.engine_steps import step_with_gradients

    config = small_config(engine__kind="zero3", model__num_layers=9, model__num_future_tokens=3)
    engine = ZeroEngine(config)
    gatherer = engine.communication.gatherer
    num_buffers = []
    for step in range(5):
        step_with_gradients(engine, global_batch(config, step, 2))
        engine.evaluate(own_share(global_batch(config, 9, 2), engine.rank, 2))
        gatherer.release_all()
        num_buffers.append(sum(len(buffers) for buffers in gatherer._free_buffers.values()))
    return num_buffers[1], num_buffers[-1], sum(unit.buffer is not None for unit in gatherer._units)


def test_few_buffers_are_reused_for_all_weights():
    """Nine layers need four buffers: one for the running layer or pinned head, two prefetched ones, one just released.

    Embedding and unembedding have one buffer each.
    """
    after_2_steps, after_5_steps, num_gathered = run_ranks(_buffers_of_steps, 2)[0]
    assert after_2_steps == after_5_steps <= 4 + 2
    assert num_gathered == 0


def _gloo_work_names() -> set[str]:
    """Returns gloo's names of the gathers in three steps."""
    from megamtp.engines.deepspeed.gather import WeightGatherer

    names = set()
    all_gather = WeightGatherer._all_gather

    def recording_all_gather(*arguments) -> list[dist.Work]:
        works = all_gather(*arguments)
        names.update(str(work._get_op_type()).removeprefix("OpType.") for work in works)
        return works

    WeightGatherer._all_gather = recording_all_gather
    _three_steps("grouped", 2, {})
    return names


def test_gloo_works_have_short_names():
    """torch's gloo backend frees a longer name twice if its two threads finish a work at the same time.

    See WeightGatherer._all_gather.
    """
    names = run_ranks(_gloo_work_names, 2)[0]
    assert names and all(len(name) <= 15 for name in names), names


def _replaced_and_restored() -> tuple[list[bool], float]:
    """Returns whether each part was replaced and restored, and the largest gradient error after the removal."""
    from megamtp.engines.zero import ZeroEngine
    from tests.engine_steps import largest_errors

    config = small_config(engine__kind="zero3")
    engine = ZeroEngine(config)
    largest_errors(config, engine, num_steps=2)
    optimizer, communication = engine.deepspeed_engine.optimizer, engine.communication
    coordinator, stream = communication._replaced
    replaced = optimizer.parameter_offload.param_coordinator is not coordinator
    communication.remove()
    restored = [
        optimizer.parameter_offload.param_coordinator is coordinator,
        optimizer.reduce_and_partition_stream is stream,
        "independent_gradient_partition_epilogue" not in vars(optimizer),
    ]
    engine.communication = engine.head_hooks.communication = None
    return [replaced, *restored], largest_errors(config, engine, num_steps=3)[0]


def test_removal_restores_deepspeeds_communication():
    for replaced_and_restored, error in run_ranks(_replaced_and_restored, 2):
        assert all(replaced_and_restored)
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


def test_gathers_do_not_call_deprecated_functions_of_torch():
    assert run_ranks(_train_without_deprecated_calls, 2) == [True, True]


def test_unsupported_deepspeed_is_refused():
    check_version("0.19.9")
    with pytest.raises(InputError) as error:
        check_version("0.20.1")
    assert "0.20.1" in str(error.value)
    assert "pip install" in str(error.value)
